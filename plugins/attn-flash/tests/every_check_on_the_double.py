"""Every check of the conformance kit on FlashAttention's kernels, by the doubles; minutes. `nox -s flash` runs it.

flash/fa2 and flash/fa4 run through the real Python files of their libraries over doubles of what these launch;
flash/fa3, which is on no package index, through a stand-in.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from attn_core.conformance import check_kernel
from attn_core.conformance.checks import CHECKS

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real
import flash_real_4
from flash_doubled import doubled, registered

HERE = [check.name for check in CHECKS.values() if check.group != "manners"]  # those ask other processes
MISSING_2 = pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed")
MISSING_4 = pytest.mark.skipif(flash_real_4.source() is None, reason="flash-attn-4 is not installed")


def library_of(name: str, folder: Path) -> AbstractContextManager[object]:
    if name == "fa3":
        return doubled(folder, name)
    return flash_real.over_the_double() if name == "fa2" else flash_real_4.over_the_double(folder)


@pytest.mark.parametrize(
    "name", [pytest.param("fa2", marks=MISSING_2), pytest.param("fa3"), pytest.param("fa4", marks=MISSING_4)]
)
def test_the_adapter_keeps_what_is_declared(tmp_path, name):
    with library_of(name, tmp_path), registered(name):
        results = [result for check in HERE for result in check_kernel(f"flash/{name}", only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50
