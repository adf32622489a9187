"""Every check of the conformance kit on FlashAttention's kernels, by the doubles; minutes. `nox -s flash` runs it.

flash/fa2 and flash/fa4 run through the real Python files of their libraries over doubles of what these launch, where
the libraries are installed, and through stand-ins for them as well; flash/fa3 through a stand-in.
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
MISSING = {
    "fa2": pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed"),
    "fa4": pytest.mark.skipif(flash_real_4.source() is None, reason="flash-attn-4 is not installed"),
}
WAYS = [
    pytest.param(name, "real", id=f"flash/{name}, the real front end", marks=mark) for name, mark in MISSING.items()
]
WAYS += [pytest.param(name, "stand-in", id=f"flash/{name}, by a stand-in") for name in ("fa2", "fa3", "fa4")]


def library_of(name: str, way: str, folder: Path) -> AbstractContextManager[object]:
    if way == "stand-in":
        return doubled(folder, name)
    return flash_real.over_the_double() if name == "fa2" else flash_real_4.over_the_double(folder)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_adapter_keeps_what_is_declared(tmp_path, name, way):
    with library_of(name, way, tmp_path), registered(name):
        results = [result for check in HERE for result in check_kernel(f"flash/{name}", only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50
