"""Every kernel that accepts a random problem agrees with the float64 reference, forward and backward.

A refusal must be of something that the problem asks for; that the op behind it really cannot do it is shown, one by
one, in `test_torch_kernels.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_core import Problem, TensorBias, explain
from attn_core.conformance.numbers import assert_dropout_is_honoured
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import build
from attn_core.testing.strategies import layouts, problems
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SEED = 20261121
PROBLEMS = 1050
#: Kernels that must have taken at least so many of the problems.
ACCEPTED = {"torch/flash": 100, "torch/math": 100, "torch/reference": 100, "torch/flex": 100, "torch/tiled": 100}
#: How often each thing that a kernel may declare must have been asked for.
ASKED = 20

#: What a refusal of this field says was asked for.
REASONS = {
    "dtype": lambda p: p.dtype is torch.float64,
    "softcap": lambda p: p.softcap is not None,
    "dropout_p": lambda p: p.dropout_p > 0,
    "return_lse": lambda p: p.return_lse,
    "empty_lengths": lambda p: 0 in (p.batch, p.seqlen_q, p.seqlen_kv),
    "backward": lambda p: p.needs_backward,
    "lse_grad": lambda p: p.needs_backward and p.return_lse,
    "bias_grad": lambda p: p.bias_requires_grad,
    "bias": lambda p: p.bias is not None and bool(p.bias.scores),  # every kernel takes masks, written out or not
}

accepted: Counter[str] = Counter()
compared: Counter[str] = Counter()
asked: Counter[str] = Counter()
refused: Counter[str] = Counter()


def what_is_asked(problem: Problem) -> list[str]:
    """The declarable things that this problem asks for."""
    bias = "no bias" if problem.bias is None else type(problem.bias).__name__
    if isinstance(problem.bias, TensorBias):
        bias = f"TensorBias {'bool' if problem.bias.tensor.dtype is torch.bool else 'float'}"
    conditions = {
        "head_dim odd": problem.head_dim % 2,
        "head_dim above 128": problem.head_dim > 128,
        "head_dim_v": problem.head_dim_v != problem.head_dim,
        "gqa": problem.num_heads != problem.num_kv_heads,
        "softcap": problem.softcap is not None,
        "dropout": problem.dropout_p,
        "return_lse": problem.return_lse,
        "requires_grad": problem.requires_grad,
        "lse_grad": problem.requires_grad and problem.return_lse,
        "bias_grad": problem.bias_requires_grad,
        "strided_head_dim": problem.strided_head_dim,
        "empty batch": problem.batch == 0,
        "empty seqlen_q": problem.seqlen_q == 0,
        "empty seqlen_kv": problem.seqlen_kv == 0,
        "deterministic": problem.deterministic,
        "scale 0": problem.scale == 0.0,
        "unequal lengths": problem.seqlen_q != problem.seqlen_kv,
    }
    names = [name for name, asked_for in conditions.items() if asked_for]
    return [str(problem.dtype), bias, *names]


@pytest.fixture(autouse=True)
def _determinism_as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@seed(SEED)
@settings(
    max_examples=PROBLEMS,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(
    problem=problems(),
    layout=layouts(),
    numbers=st.integers(0, 2**31 - 1),
    empty_rows=st.booleans(),
    magnitude=st.sampled_from((1.0, 1.0, 0.1, 4.0)),
)
def agree_on(problem: Problem, layout: str, numbers: int, empty_rows: bool, magnitude: float) -> None:
    torch.use_deterministic_algorithms(problem.deterministic)
    inputs = build(problem, seed=numbers, layout=layout, empty_rows=empty_rows, magnitude=magnitude)
    told = explain(inputs.query, inputs.key, inputs.value, inputs.bias, **inputs.options)
    assert replace(told.problem, bias=None) == replace(problem, bias=None)
    assert type(told.problem.bias) is type(problem.bias)
    names = [verdict.kernel for verdict in told if verdict.seconds is not None]
    assert "torch/reference" in names, "there is always an answer"
    for verdict in told:
        if verdict.state == "refused":
            assert verdict.refused_fields, verdict
            for field in verdict.refused_fields:
                if field == "device":
                    continue  # a plugin's kernel, for another one; torch's for CUDA are unavailable without it
                assert REASONS[field](problem), f"{verdict.kernel} refuses {field}, which is not asked for: {problem}"
                refused[field] += 1
    asked.update(what_is_asked(problem))
    accepted.update(names)
    if problem.dropout_p:
        for name in names:
            assert_dropout_is_honoured(name, inputs)
        return
    for name, results in zip(names, differences(problem, inputs, *map(by_kernel, names))):
        wrong = [str(result) for result in results if not result]
        assert not wrong, "\n".join([f"{name} on {problem}, layout {layout}:", *wrong])
        compared[name] += len(results)


def test_every_accepting_kernel_agrees_with_the_reference(say: Callable[[str], None]) -> None:
    try:
        agree_on()
    finally:
        say(f"seed {SEED}; accepted of {PROBLEMS}: {dict(sorted(accepted.items()))}")
        say(f"results compared: {dict(sorted(compared.items()))}")
        say(f"asked for: {dict(sorted(asked.items()))}")
        say(f"refused: {dict(sorted(refused.items()))}")
    assert accepted["torch/reference"] >= PROBLEMS, "the reference takes every legal problem"
    for name, least in ACCEPTED.items():
        assert accepted[name] >= least, f"{name} took {accepted[name]} problems, fewer than {least}"
    everything = {
        *(f"torch.{name}" for name in ("float32", "float64", "bfloat16", "float16")),
        *("no bias", "Causal", "Window", "KeyPadding", "TensorBias bool", "TensorBias float"),
        *("Neighborhood", "ALiBi", "RelPosTable", "Intersection", "Sum"),
        *("head_dim odd", "head_dim above 128", "head_dim_v", "gqa", "softcap", "dropout", "return_lse"),
        *("requires_grad", "lse_grad", "bias_grad", "strided_head_dim", "deterministic", "scale 0", "unequal lengths"),
        *("empty batch", "empty seqlen_q", "empty seqlen_kv"),
    }
    rare = {name: asked[name] for name in sorted(everything) if asked[name] < ASKED}
    assert not rare, f"asked for fewer than {ASKED} times: {rare}"
    assert set(refused) == set(REASONS), "a reason that never came up is not tested"
