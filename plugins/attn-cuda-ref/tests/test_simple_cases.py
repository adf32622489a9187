"""cuda-ref/simple, forward and backward, on hundreds of small problems beside the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.reference import reference_attention
from attn_core.registry import registry
from attn_core.testing.differences import by_kernel, differences, results_of
from attn_core.testing.problems import Inputs

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple
from simple_cases import Case, cases

CASES = list(cases())
KERNEL = simple()
#: How far the LSE may lie from the reference's, for each unit of its size above 1.
LSE_ERROR = 1e-4


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with registry.register(KERNEL):
        yield


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_results_and_gradients_are_right_and_the_same_at_every_run(case: Case) -> None:
    problem, inputs, seen = case.problem, case.inputs(), []

    def kernel(x: Inputs) -> Any:
        seen.append(by_kernel(KERNEL.name)(x))
        return seen[-1]

    [comparisons] = differences(problem, inputs, kernel)
    assert all(comparisons), "\n".join(map(str, comparisons))

    results = results_of(kernel, problem, inputs)
    for first, again in zip(*(x if problem.return_lse else (x,) for x in seen)):
        assert torch.equal(first, again)
    assert not any(result.isnan().any() for result in results.values())

    _, lse = reference_attention(
        inputs.query, inputs.key, inputs.value, inputs.bias, scale=problem.scale, softcap=problem.softcap
    )
    empty = lse.isneginf()
    if problem.return_lse:
        assert torch.equal(results["lse"].isneginf(), empty)
        error = (results["lse"].double() - lse)[~empty].abs()
        assert (error <= LSE_ERROR * lse[~empty].abs().clamp(min=1.0)).all()
    rows = empty.transpose(1, 2)
    assert not results["out"][rows].any()
    assert not results["dq"][rows].any()


def test_there_are_at_least_four_hundred_cases() -> None:
    assert len(CASES) >= 400
    assert len({case.name for case in CASES}) == len(CASES)
