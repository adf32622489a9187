"""Every check of the conformance kit on FlashAttention's kernels, by the doubles; minutes. `nox -s flash` runs it.

flash/fa2 runs through the real Python package of FlashAttention-2 over the double of its extension, where the package
is installed, and through the stand-in for the package otherwise; flash/fa3 and flash/fa4 through stand-ins.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from attn_core.conformance import check_kernel
from attn_core.conformance.checks import CHECKS

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real
from flash_doubled import doubled, registered

HERE = [check.name for check in CHECKS.values() if check.group != "manners"]  # those ask other processes


@contextmanager
def the_real_package_over_the_double(folder):
    with flash_real.over_the_double(), registered("fa2"):
        yield


def stand_in(name):
    @contextmanager
    def within(folder):
        with doubled(folder, name), registered(name):
            yield

    return pytest.param(f"flash/{name}", within, id=f"flash/{name}, by a stand-in")


REAL = pytest.param(
    "flash/fa2",
    the_real_package_over_the_double,
    id="flash/fa2, by the real package",
    marks=pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed"),
)


@pytest.mark.parametrize(("name", "within"), [REAL, *map(stand_in, ("fa2", "fa3", "fa4"))])
def test_the_adapter_keeps_what_is_declared(tmp_path, name, within):
    with within(tmp_path):
        results = [result for check in HERE for result in check_kernel(name, only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50
