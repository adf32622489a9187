"""cuda-ref/simple, forward and backward, on hundreds of small problems. Minutes: `nox -s cuda_emulated` runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attn_core.registry import registry

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple
from simple_cases import Case, cases, check

CASES = list(cases())
KERNEL = simple()


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with registry.register(KERNEL):
        yield


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_results_and_gradients_are_right_and_the_same_at_every_run(case: Case) -> None:
    check(case, KERNEL.name)


def test_there_are_at_least_four_hundred_cases() -> None:
    assert len(CASES) >= 400
    assert len({case.name for case in CASES}) == len(CASES)
