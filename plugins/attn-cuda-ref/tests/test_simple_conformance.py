"""The conformance kit on cuda-ref/simple, in the emulator: every claim of its declaration, and every refusal."""

from __future__ import annotations

import sys
from pathlib import Path

from attn_core.conformance import parametrize_kernel_checks

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple


@parametrize_kernel_checks([simple()])
def test_kernel(check) -> None:
    check()
