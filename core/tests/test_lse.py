"""The LSE has one convention, whichever kernel gives it: natural logarithm, float32, `[batch, num_heads, seqlen_q]`,
-inf for a query without keys; so that partial results can be joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import Causal, KeyPadding, Problem, TensorBias, Window, attention, explain_problem, reference_attention
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import build

KERNELS = ("torch/flash", "torch/flex", "torch/reference", "torch/tiled")
BASE = Problem(
    batch=2,
    seqlen_q=6,
    seqlen_kv=9,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=16,
    dtype=torch.float32,
    device="cpu",
    scale=0.25,
    return_lse=True,
)
INF = float("inf")
EMPTY_FIRST_ROW = torch.ones(6, 9, dtype=torch.bool)
EMPTY_FIRST_ROW[0] = False
BIASES = {
    "no bias": None,
    "causal": Causal("top-left"),
    "causal with empty rows": Causal("bottom-right"),
    "window": Window(1, 0, "top-left"),
    "key padding with an empty entry": KeyPadding([0, 4]),
    "boolean with an empty row": TensorBias(EMPTY_FIRST_ROW),
    "floating with an empty row": TensorBias(torch.zeros(6, 9).masked_fill(~EMPTY_FIRST_ROW, -INF)),
}


def the_kernels_that_give_it() -> set[str]:
    return {verdict.kernel for verdict in explain_problem(BASE) if verdict.seconds is not None}


def test_these_are_all_the_kernels_that_give_an_lse_here():
    assert the_kernels_that_give_it() == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_lse_is_natural_wide_and_minus_infinity_for_an_empty_row(name, bias, dtype):
    if name == "torch/flex" and dtype is torch.float64:
        pytest.skip("torch/flex, on the CPU: it takes no float64")
    if name == "torch/tiled" and isinstance(BIASES[bias], TensorBias):
        pytest.skip("torch/tiled: it takes no tensor as a mask")
    seqlen_q = 12 if bias == "causal with empty rows" else 6  # more queries than keys: the first see none
    given = None if BIASES[bias] is None else BIASES[bias].bind(seqlen_q, 9)
    problem = replace(BASE, dtype=dtype, seqlen_q=seqlen_q, bias=None if given is None else given.without_data())
    inputs = build(problem, seed=1, bias=given)
    (results,) = differences(problem, inputs, by_kernel(name))
    assert [result.name for result in results] == ["out", "lse"]
    assert all(results), "\n".join(map(str, results))

    out, lse = by_kernel(name)(inputs)
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert lse.shape == (2, 4, seqlen_q)
    keep = torch.ones(2, 1, seqlen_q, 9, dtype=torch.bool) if given is None else given.materialize()
    keep = keep if keep.dtype is torch.bool else keep != -INF
    empty = ~keep.expand(2, 4, seqlen_q, 9).any(-1)
    assert ("empty" in bias) == bool(empty.any())
    assert torch.equal(lse == -INF, empty)
    assert (out.transpose(1, 2)[empty] == 0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_the_lse_is_that_of_the_logits_after_softcap_and_bias(name):
    if name in ("torch/flash", "torch/tiled"):
        pytest.skip(f"{name}: it takes no softcap")
    table = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    problem = replace(BASE, softcap=0.5, bias=TensorBias(table).bind(6, 9).without_data())
    inputs = build(problem, seed=2, bias=TensorBias(table), magnitude=3.0)
    _, lse = by_kernel(name)(inputs)
    key = inputs.key.repeat_interleave(2, 2)
    logits = 0.5 * torch.tanh(0.25 * torch.einsum("bqhd,bkhd->bhqk", inputs.query, key) / 0.5) + table
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))


@pytest.mark.parametrize("name", KERNELS)
def test_logits_far_below_zero_keep_their_lse(name):
    """exp(-200) is 0 in float32: an LSE that is not taken relative to the largest logit would be -inf."""
    query = torch.ones(1, 4, 2, 8)
    _, lse = attention(query, -200.0 / 8 * query, query, scale=1.0, return_lse=True, kernel=name)
    torch.testing.assert_close(lse, torch.full((1, 2, 4), -200.0 + torch.log(torch.tensor(4.0)).item()))


def joined(parts):
    """Partial results weighted by their share of the sum, as one would write it down."""
    lses = torch.stack([lse for _, lse in parts]).double()
    total = torch.logsumexp(lses.masked_fill(lses == -INF, -1e300), 0)
    shares = torch.exp(lses - total)
    outs = torch.stack([out for out, _ in parts]).double()
    return (shares.transpose(2, 3).unsqueeze(-1) * outs).sum(0), total


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_two_halves_of_the_keys_join_to_the_whole(name, cut):
    inputs = build(BASE, seed=3)
    query, key, value = inputs.query, inputs.key, inputs.value
    halves = [
        attention(query, key[:, part], value[:, part], scale=0.25, return_lse=True, kernel=name)
        for part in (slice(None, cut), slice(cut, None))
    ]
    out, lse = joined(halves)
    wanted_out, wanted_lse = reference_attention(query, key, value, scale=0.25)
    torch.testing.assert_close(out, wanted_out, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_a_half_without_any_allowed_key_joins_as_nothing(name):
    inputs = build(BASE, seed=4)
    query, key, value = inputs.query, inputs.key, inputs.value
    none = attention(query, key, value, KeyPadding([0, 0]), scale=0.25, return_lse=True, kernel=name)
    all_of_it = attention(query, key, value, scale=0.25, return_lse=True, kernel=name)
    out, lse = joined([none, all_of_it])
    torch.testing.assert_close(out, all_of_it[0].double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(lse, all_of_it[1].double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["torch/flash", "torch/reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_flows_through_the_lse_where_it_is_declared(name, dtype, bias):
    seqlen_q = 12 if bias == "causal with empty rows" else 6
    given = None if BIASES[bias] is None else BIASES[bias].bind(seqlen_q, 9)
    asked = None if given is None else given.without_data()
    problem = replace(BASE, requires_grad=True, seqlen_q=seqlen_q, dtype=dtype, bias=asked)
    assert explain_problem(problem)[name].seconds is not None
    (results,) = differences(problem, build(problem, seed=5, bias=given), by_kernel(name))
    assert [result.name for result in results] == ["out", "lse", "dq", "dk", "dv"]
    assert all(results), "\n".join(map(str, results))


def of_both(call):
    """A loss that out and LSE enter."""

    def loss(*operands):
        out, lse = call(*operands)
        return (out.square().sum() + lse.sin().sum()).double()

    return loss


def with_lse(*operands):
    return attention(*operands, scale=0.25, return_lse=True)


def by_definition(*operands):
    return reference_attention(*operands, scale=0.25)


def test_func_grad_and_vmap_through_the_lse_equal_the_reference():
    inputs = build(replace(BASE, dtype=torch.float64), seed=7)
    x = inputs.query, inputs.key, inputs.value
    got, wanted = (torch.func.grad(of_both(call), argnums=(0, 1, 2))(*x) for call in (with_lse, by_definition))
    torch.testing.assert_close(got, wanted)
    each = [torch.stack([y, 2 * y, 3 * y]) for y in x]
    torch.testing.assert_close(torch.func.vmap(with_lse)(*each), torch.func.vmap(by_definition)(*each))
    per_sample = [torch.func.vmap(torch.func.grad(of_both(call)))(*each) for call in (with_lse, by_definition)]
    torch.testing.assert_close(*per_sample)


def test_jvp_through_the_lse_equals_the_reference():
    inputs = build(replace(BASE, dtype=torch.float64), seed=8)
    x = inputs.query, inputs.key, inputs.value
    tangents = tuple(y.cos() for y in x)
    got, wanted = (torch.func.jvp(call, x, tangents) for call in (with_lse, by_definition))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_lse_that_nobody_differentiates_costs_no_slower_kernel(dtype):
    """Without a gradient to flow, the fast kernel serves."""
    inputs = build(replace(BASE, dtype=dtype), seed=6)
    with torch.no_grad():
        assert explain_problem(replace(BASE, dtype=dtype)).chosen == "torch/flash"
        assert attention(inputs.query, inputs.key, inputs.value, return_lse=True)[1].dtype is torch.float32
