"""xFormers for the tests that ask for it: the real one where it is installed, else the double."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from xformers_here import xformers_here


@pytest.fixture(scope="module")
def fmha() -> Iterator[object]:
    """`xformers.ops.fmha`."""
    with xformers_here() as module:
        yield module
