"""Adaptations keep the meaning: a kernel that can do little, adapted, equals the reference, forward and backward.

The kernels here are toys with one narrow limit each. They compute in the operands' dtype by plain products, and insist
on what they declare, so that an adaptation that is not applied is an error and not a rounding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import (
    ANY_DIM,
    Backward,
    Capabilities,
    Causal,
    Kernel,
    KeyPadding,
    Problem,
    TensorBias,
    Window,
    attention,
    explain,
    explain_problem,
    kernel,
    register,
)
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.naive import naive_attention
from attn_core.testing.problems import LAYOUTS, build

BASE = Problem(
    batch=2,
    seqlen_q=5,
    seqlen_kv=7,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    head_dim_v=8,
    dtype=torch.float64,
    device="cpu",
    scale=8**-0.5,
    requires_grad=True,
)
PADDING = KeyPadding(torch.empty(2, dtype=torch.int64, device="meta"))
GROUPED = {"num_kv_heads": 2}
ODD = {"head_dim": 5, "head_dim_v": 5, "scale": 5**-0.5}
ODD_V = {"head_dim": 8, "head_dim_v": 11}


def plain(query, key, value, *, bias=None, scale, return_lse=False):
    """Heads-last, and nothing but what it is given: one key head per query head, and one head_dim a multiple of 8."""
    assert key.shape[2] == query.shape[2], "expand_kv was not applied"
    assert query.shape[3] % 8 == 0, "pad_head_dim was not applied"
    assert query.shape[3] == value.shape[3], "pad_head_dim was not applied to value"
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "contiguous was not applied"
    assert bias is None or type(bias) is TensorBias, "materialize was not applied"
    assert bool(torch.isfinite(key).all() & torch.isfinite(value).all()), "zero_padding was not applied"
    out, lse = naive_attention(query, key, value, bias, scale=scale)
    return (out, lse) if return_lse else out


def plain_heads_first(query, key, value, *, bias=None, scale, return_lse=False):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    result = plain(query, key, value, bias=bias, scale=scale, return_lse=return_lse)
    return (result[0].transpose(1, 2), result[1]) if return_lse else result.transpose(1, 2)


@pytest.fixture(params=["heads-last", "heads-first"])
def narrow(request):
    """A kernel that takes one head_dim, a multiple of 8, no GQA, contiguous operands, and tensors for biases."""
    capabilities = Capabilities(
        devices={"cpu"},
        dtypes={torch.float32, torch.float64, torch.bfloat16, torch.float16},
        head_dims=range(8, 65, 8),
        biases={TensorBias},
        backward=Backward(bias_grad=True, lse_grad=True),
        return_lse=True,
    )
    run = plain if request.param == "heads-last" else plain_heads_first
    with register(Kernel(name="toy/narrow", run=run, capabilities=capabilities, layout=request.param)):
        yield "toy/narrow"


CASES = {
    "expand_kv": (GROUPED, ("expand_kv",)),
    "expand_kv to one": ({"num_kv_heads": 1}, ("expand_kv",)),
    "pad_head_dim": (ODD, ("pad_head_dim",)),
    "pad_head_dim of value": (ODD_V, ("pad_head_dim",)),
    "pad_head_dim of query": ({"head_dim": 3, "head_dim_v": 8, "scale": 3**-0.5}, ("pad_head_dim",)),
    "contiguous": ({"strided_head_dim": True}, ("contiguous",)),
    "materialize causal": ({"bias": Causal("bottom-right").bind(5, 7)}, ("materialize",)),
    "materialize window": ({"bias": Window(1, 2, "top-left").bind(5, 7)}, ("materialize",)),
    "materialize with empty rows": ({"bias": Causal("bottom-right").bind(5, 3), "seqlen_kv": 3}, ("materialize",)),
    "zero_padding": ({"bias": PADDING}, ("zero_padding", "materialize")),
    "all at once": (
        {**GROUPED, **ODD, "head_dim_v": 11, "strided_head_dim": True, "bias": PADDING},
        ("contiguous", "expand_kv", "pad_head_dim", "zero_padding", "materialize"),
    ),
}


def problem_of(case: str) -> Problem:
    problem = replace(BASE, **CASES[case][0])
    if problem.bias is None:
        return problem
    return replace(problem, bias=problem.bias.bind(problem.seqlen_q, problem.seqlen_kv))


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapted_kernel_equals_the_reference_forward_and_backward(narrow, case, return_lse):
    problem = replace(problem_of(case), return_lse=return_lse)
    for seed, layout in enumerate(LAYOUTS):
        inputs = build(problem, seed=seed, layout=layout)
        (results,) = differences(problem, inputs, by_kernel(narrow))
        assert {result.name for result in results} >= {"out", "dq", "dk", "dv"}
        assert all(results), "\n".join(map(str, results))


@pytest.mark.parametrize("case", CASES)
def test_adaptations_are_named_by_explain_in_the_order_of_their_application(narrow, case):
    verdict = explain_problem(problem_of(case))[narrow]
    assert verdict.state in ("ready", "chosen")
    assert verdict.adaptations == CASES[case][1]


@pytest.mark.parametrize("case", CASES)
def test_an_adaptation_costs_more_than_none(narrow, case):
    """The same kernel on the problem as it stands after the adaptations is cheaper by what they take."""
    problem = problem_of(case)
    adapted = explain_problem(problem)[narrow]
    size, heads = (16 if problem.head_dim_v > 8 else 8), problem.num_heads
    bias = None
    if problem.bias is not None:
        shape = (*problem.bias.batch_and_heads, problem.seqlen_q, problem.seqlen_kv)
        bias = TensorBias(torch.empty(shape, dtype=torch.bool, device="meta")).bind(problem.seqlen_q, problem.seqlen_kv)
    as_it_wants = replace(
        problem, num_kv_heads=heads, head_dim=size, head_dim_v=size, strided_head_dim=False, bias=bias
    )
    direct = explain_problem(as_it_wants)[narrow]
    assert direct.adaptations == ()
    assert adapted.seconds > direct.seconds


def test_an_adaptation_of_more_elements_costs_more(narrow):
    small, large = (replace(BASE, num_kv_heads=2, seqlen_kv=n, seqlen_q=1) for n in (16, 4096))
    whole = [replace(problem, num_kv_heads=4) for problem in (small, large)]
    extra = [
        explain_problem(grouped)[narrow].seconds - explain_problem(direct)[narrow].seconds
        for grouped, direct in zip((small, large), whole)
    ]
    assert extra[1] > 2 * extra[0] > 0


def test_key_heads_are_repeated_only_for_the_backward_where_that_alone_needs_it():
    capabilities = Capabilities(
        devices={"cpu"}, dtypes={torch.float64}, head_dims={8}, gqa=True, backward=Backward(gqa=False)
    )

    def run(query, key, value, *, scale):
        assert key.shape[2] == (4 if query.requires_grad else 2)
        return naive_attention(query, key, value, None, scale=scale)[0]

    with register(Kernel(name="toy/inference", run=run, capabilities=capabilities)):
        for trained, adaptations in ((True, ("expand_kv",)), (False, ())):
            problem = replace(BASE, **GROUPED, requires_grad=trained)
            assert explain_problem(problem)["toy/inference"].adaptations == adaptations
            (results,) = differences(problem, build(problem, seed=5), by_kernel("toy/inference"))
            assert {result.name for result in results} == ({"out", "dq", "dk", "dv"} if trained else {"out"})
            assert all(results), "\n".join(map(str, results))


def test_the_default_scale_is_that_of_the_head_dim_before_padding(narrow):
    inputs = build(replace(BASE, **ODD), seed=1)
    operands = (inputs.query, inputs.key, inputs.value)
    told = explain(*operands)
    assert told.problem.scale == 5**-0.5
    assert told[narrow].adaptations == ("pad_head_dim",)
    got = attention(*operands, kernel=narrow)
    torch.testing.assert_close(got, attention(*operands, scale=5**-0.5, kernel="torch/reference"))
    assert got.shape[-1] == 5


def test_what_lies_behind_the_lengths_does_not_leak_nor_gets_a_gradient(narrow):
    problem = problem_of("zero_padding")
    inputs = build(problem, seed=3, bias=KeyPadding([7, 3]))
    with torch.no_grad():
        inputs.key[1, 3:], inputs.value[1, 3:] = torch.nan, torch.inf
    out = by_kernel(narrow)(inputs)
    assert torch.isfinite(out).all()
    gradients = torch.autograd.grad(out, (inputs.query, inputs.key, inputs.value), inputs.grad_out)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][1, 3:] == 0).all()
    assert (gradients[2][1, 3:] == 0).all()


def test_an_adapted_call_is_cached_and_takes_each_calls_own_lengths(narrow):
    """The second call finds the choice of the first; its bias holds other numbers."""
    problem = problem_of("zero_padding")
    for seqlens in ([7, 3], [0, 7], [1, 1]):
        inputs = build(problem, seed=4, bias=KeyPadding(seqlens))
        (results,) = differences(problem, inputs, by_kernel(narrow))
        assert all(results), "\n".join(map(str, results))


def test_a_gradient_flows_through_an_adaptation_to_the_bias(narrow):
    table = TensorBias(torch.empty(4, 5, 7, dtype=torch.float64, device="meta", requires_grad=True)).bind(5, 7)
    problem = replace(BASE, **GROUPED, **ODD, bias=table, bias_requires_grad=True)
    (results,) = differences(problem, build(problem, seed=5), by_kernel(narrow))
    assert "dbias" in {result.name for result in results}
    assert all(results), "\n".join(map(str, results))


def test_without_a_dense_bias_a_mask_cannot_be_written_out():
    capabilities = Capabilities(devices={"cpu"}, dtypes={torch.float64}, head_dims=ANY_DIM)

    def run(query, key, value, *, scale):
        return query

    with register(Kernel(name="toy/bare", run=run, capabilities=capabilities)):
        told = explain_problem(replace(BASE, requires_grad=False, bias=Causal("bottom-right").bind(5, 7)))
        assert told["toy/bare"].refused_fields == ("bias",)
        assert told["toy/bare"].reasons == ('bias: takes no bias, got Causal("bottom-right").bind(5, 7)',)


def test_a_head_dim_is_not_padded_to_far_more_than_itself():
    """Twice the work at most: beyond that, a kernel made for the size is the better answer."""
    capabilities = Capabilities(devices={"cpu"}, dtypes={torch.float64}, head_dims={256}, backward=True)

    def run(query, key, value, *, scale):
        return query

    with register(Kernel(name="toy/large", run=run, capabilities=capabilities)):
        assert explain_problem(replace(BASE, head_dim=16, head_dim_v=16))["toy/large"].refused_fields == ("head_dim",)
        assert explain_problem(replace(BASE, head_dim=200, head_dim_v=200))["toy/large"].adaptations == (
            "pad_head_dim",
        )


def test_reasons_of_a_refusal_are_those_of_the_call_as_it_was_written(narrow):
    """What an adaptation would have solved is not a reason; what it cannot is."""
    told = explain_problem(replace(BASE, **GROUPED, softcap=2.0))[narrow]
    assert told.refused_fields == ("softcap",)


@pytest.mark.parametrize("name", ["torch/flash", "torch/math", "torch/flex"])
def test_torch_kernels_need_zero_padding_and_say_so(name):
    problem = replace(problem_of("zero_padding"), requires_grad=False, dtype=torch.float32)
    assert explain_problem(problem)[name].adaptations[0] == "zero_padding"
    assert kernel("torch/reference").refusals(problem) == []
