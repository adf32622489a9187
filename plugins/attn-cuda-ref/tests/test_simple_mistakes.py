"""A sample of the mistakes in the text of cuda-ref/simple; `every_mistake_emulated.py` has them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.toolchain import missing_tool
from simple_mistakes import MUTANTS, check

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)

SAMPLE = (
    "a missing barrier behind the load of a tile",
    "a tail that is read beyond the tensor",
    "the key head of another group",
    "a lost rescale of the sums",
    "the LSE of a row without keys",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_mistake_in_the_text_is_caught(name: str, tmp_path: Path) -> None:
    check(MUTANTS[name], tmp_path)
