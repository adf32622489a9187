"""Each of some twenty mistakes in the text of cuda-ref/simple is caught. A minute: `nox -s cuda_emulated` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.toolchain import missing_tool
from simple_mistakes import MUTANTS, check

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_text_is_caught(name: str, tmp_path: Path) -> None:
    check(MUTANTS[name], tmp_path)
