"""What the emulator builds for the tests is built once for all processes of a run, and goes with it.

CUDA_REF_EMULATOR=FOLDER keeps it for the next run: what is there is known by its content.
"""

from __future__ import annotations

import os
import tempfile

import pytest

VARIABLE = "CUDA_REF_EMULATOR"
kept: list[tempfile.TemporaryDirectory[str]] = []


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE not in os.environ:  # in the process that starts others, which inherit it
        kept.append(tempfile.TemporaryDirectory(prefix="attn-emulator-"))
        os.environ[VARIABLE] = kept[0].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if kept:
        del os.environ[VARIABLE]
        kept.pop().cleanup()
