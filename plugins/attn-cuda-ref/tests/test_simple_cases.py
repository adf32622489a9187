"""cuda-ref/simple on a sample of the small problems; `every_case_emulated.py` has them all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attn_core.registry import registry

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple
from simple_cases import Case, cases, check

#: One compilation of each, with all of its lengths.
KINDS = "none, float16", "causal, float32", "segments, bfloat16", "tensor, float32, head_dim 5", "table, f"
CASES = [case for case in cases() if case.name.startswith(KINDS)]
KERNEL = simple()


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with registry.register(KERNEL):
        yield


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_results_and_gradients_are_right_and_the_same_at_every_run(case: Case) -> None:
    check(case, KERNEL.name)
