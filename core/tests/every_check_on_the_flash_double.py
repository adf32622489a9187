"""Every check of the conformance kit on torch/fa-window and torch/varlen, by the double of torch's ops."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attn_core.conformance import check_kernel
from attn_core.conformance.checks import CHECKS

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_ops_doubled import KERNELS, doubled, registered


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_declared_is_kept(name):
    here = [check.name for check in CHECKS.values() if check.group != "manners"]  # those ask other processes
    with doubled(), registered():
        results = [result for check in here for result in check_kernel(name, only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50
