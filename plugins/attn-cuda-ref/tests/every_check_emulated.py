"""The whole conformance kit on cuda-ref/simple, in the emulator. Minutes: `nox -s cuda_emulated` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

from attn_core.conformance import parametrize_kernel_checks

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple


@parametrize_kernel_checks([simple()])
def test_simple(check) -> None:
    check()
