"""Every check of the conformance kit on pairs of operators for the CPU. Minutes: `nox -s xformers` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attn_core.conformance import check_kernel
from attn_core.conformance.checks import CHECKS
from attn_xformers import kernel_of

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import cpu_operators
from xformers_here import xformers_here


@pytest.mark.parametrize("name", cpu_operators.ALL)
def test_the_adapter_keeps_what_is_declared(name):
    here = [check.name for check in CHECKS.values() if check.group != "manners"]  # those ask other processes
    with xformers_here():
        made = cpu_operators.ALL[name]()
        kernel = kernel_of(name, made.forward, made.backward, manners=made.manners)
        results = [result for check in here for result in check_kernel(kernel, only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50
