"""The error budget passes what is right and catches what is wrong: it is tested with saboteurs, kernels with one fault
each, of the kinds that have been seen in the wild."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attn_core import Backward, Capabilities, Causal, Kernel, Problem, TensorBias, Window, register
from attn_core.testing.budget import compare
from attn_core.testing.differences import by_kernel, by_naive, differences
from attn_core.testing.naive import naive_attention
from attn_core.testing.problems import LAYOUTS, build

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
BASE = Problem(
    batch=2,
    seqlen_q=33,
    seqlen_kv=37,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=16,
    dtype=torch.float32,
    device="cpu",
    scale=0.25,
    requires_grad=True,
    return_lse=True,
)


def number(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# compare


def test_what_is_equal_passes():
    assert compare("out", number(1.0, 2.0), number(1.0, 2.0).double(), number(1.0, 2.0), torch.float32)


def test_twice_the_naive_error_passes_and_three_times_does_not():
    reference, naive = number(1.0, 1.0).double(), number(1.001, 1.0)
    assert compare("out", number(1.0, 1.0019), reference, naive, torch.float32)
    assert not compare("out", number(1.0, 1.0030), reference, naive, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_ulp_pass_where_the_naive_run_is_exact(dtype):
    exact = number(1.0, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert compare("out", number(1.0 + 3 * eps, dtype=dtype), exact, number(1.0, dtype=dtype), dtype)
    assert not compare("out", number(1.0 + 6 * eps, dtype=dtype), exact, number(1.0, dtype=dtype), dtype)


def test_an_ulp_counts_at_the_size_of_the_terms_element_by_element():
    zero, small = number(0.0, 0.0).double(), number(1e-6, 1e-6)
    terms = number(10.0, 0.01)
    found = compare("dq", small, zero, zero.float(), torch.float32, terms=terms)
    assert not found
    assert found.worst == (1,)
    assert found.failing == 1


def test_nan_on_one_side_fails_and_on_both_passes():
    one, nan = number(1.0, 2.0), number(1.0, NAN)
    assert compare("out", nan, nan.double(), one, torch.float32)
    only_got = compare("out", nan, one.double(), one, torch.float32)
    assert not only_got
    assert "is NaN where the reference is not" in str(only_got)
    only_reference = compare("out", one, nan.double(), one, torch.float32)
    assert not only_reference
    assert "is a number where the reference is NaN" in str(only_reference)


def test_minus_infinity_must_match_exactly():
    exact = number(-INF, 1.0).double()
    assert compare("lse", number(-INF, 1.0), exact, exact.float(), torch.float32)
    for wrong in (0.0, INF, NAN, torch.finfo(torch.float32).min):
        assert not compare("lse", number(wrong, 1.0), exact, exact.float(), torch.float32), wrong
    assert not compare("lse", number(-INF, -INF), exact, exact.float(), torch.float32)


def test_a_naive_run_that_overflows_gives_no_licence():
    found = compare("out", number(5.0, 1.0), number(1.0, 1.0).double(), number(INF, 1.0), torch.float32)
    assert not found
    assert found.naive_error == 0.0


def test_another_shape_or_dtype_fails_and_says_so():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    assert "has shape [3, 2], must be [2, 3]" in str(compare("out", torch.zeros(3, 2), exact, exact, torch.float32))
    wide = compare("out", torch.zeros(2, 3).double(), exact, exact, torch.float32)
    assert "has dtype torch.float64, must be torch.float32" in str(wide)


def test_the_report_has_the_worst_place_both_values_both_errors_and_what_was_allowed():
    got = torch.ones(2, 3, 4)
    got[1, 0, 2], got[0, 1, 1] = 1.5, 1.25
    found = compare("dk", got, torch.ones(2, 3, 4).double(), torch.full((2, 3, 4), 1.01), torch.float32)
    assert found.worst == (1, 0, 2)
    assert found.failing == 2
    assert str(found) == (
        "dk: is beyond the budget, 2 of 24 elements; worst at [1, 0, 2]: got 1.5, reference 1, error 0.5,"
        " allowed 0.02 (2 x the naive run's 0.01 + 4 ulp)"
    )


def test_an_empty_result_passes():
    empty = torch.zeros(0, 3)
    assert compare("out", empty, empty.double(), empty, torch.float32)


# A kernel that is right passes, whatever the sizes; one that is wrong does not


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_naive_run_is_within_its_own_budget(dtype):
    problem = replace(BASE, dtype=dtype, bias=Causal("bottom-right").bind(33, 37))
    for seed in range(5):
        (results,) = differences(problem, build(problem, seed=seed), by_naive)
        assert [result.name for result in results] == ["out", "lse", "dq", "dk", "dv"]
        assert all(results), "\n".join(map(str, results))


def repeated(key):
    """Key heads in the wrong order: query head h reads h % num_kv_heads."""
    return key.repeat(1, 1, 2, 1)


def bound_as(kind):
    return kind.bind(33, 37)


SABOTEURS = {
    "the scale is dropped": lambda q, k, v, b, s: naive_attention(q, k, v, b, scale=1.0),
    "the scale is that of a padded head_dim": lambda q, k, v, b, s: naive_attention(q, k, v, b, scale=24**-0.5),
    "the causal corner is the other": lambda q, k, v, b, s: naive_attention(
        q, k, v, bound_as(Causal("top-left")), scale=s
    ),
    "the diagonal is off by one": lambda q, k, v, b, s: naive_attention(
        q, k, v, bound_as(Window(None, 1, "bottom-right")), scale=s
    ),
    "the bias vanishes": lambda q, k, v, b, s: naive_attention(q, k, v, None, scale=s),
    "key heads are read in the wrong order": lambda q, k, v, b, s: naive_attention(
        q, repeated(k), repeated(v), b, scale=s
    ),
    "the LSE has base 2": lambda q, k, v, b, s: (
        naive_attention(q, k, v, b, scale=s)[0],
        naive_attention(q, k, v, b, scale=s)[1] / math.log(2),
    ),
    "the LSE is that of the unscaled logits": lambda q, k, v, b, s: (
        naive_attention(q, k, v, b, scale=s)[0],
        naive_attention(q, k, v, b, scale=1.0)[1],
    ),
    "the last key is forgotten": lambda q, k, v, b, s: naive_attention(
        q, k, v, TensorBias(b.materialize() & (torch.arange(37) < 36)), scale=s
    ),
    "the gradient to the key is detached": lambda q, k, v, b, s: naive_attention(q, k.detach(), v, b, scale=s),
    "the gradient to the value is halved": lambda q, k, v, b, s: naive_attention(
        q, k, 0.5 * v + 0.5 * v.detach(), b, scale=s
    ),
    "one row is computed in a narrower dtype": lambda q, k, v, b, s: narrowed(q, k, v, b, s),
}


def narrowed(q, k, v, b, s):
    out, lse = naive_attention(q, k, v, b, scale=s)
    narrower = {torch.float64: torch.float32, torch.float32: torch.float16}.get(q.dtype, torch.float8_e5m2)
    row = out[:, 7:8]
    return torch.cat([out[:, :7], row + (row.detach().to(narrower).to(q.dtype) - row.detach()), out[:, 8:]], 1), lse


@pytest.fixture
def sabotaged(request):
    saboteur = SABOTEURS[request.param]

    def run(query, key, value, *, bias=None, scale, return_lse=False):
        out, lse = saboteur(query, key, value, bias, scale)
        return (out, lse) if return_lse else out

    capabilities = Capabilities(
        devices={"cpu"},
        dtypes=set(DTYPES),
        head_dims=range(1, 257),
        biases={Causal},
        backward=Backward(lse_grad=True),
        gqa=True,
        return_lse=True,
    )
    with register(Kernel(name="toy/saboteur", run=run, capabilities=capabilities)):
        yield "toy/saboteur"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sabotaged", SABOTEURS, indirect=True)
def test_a_saboteur_is_caught_in_every_dtype(sabotaged, dtype):
    problem = replace(BASE, dtype=dtype, bias=Causal("bottom-right").bind(33, 37))
    (results,) = differences(problem, build(problem, seed=1), by_kernel(sabotaged))
    assert not all(results), "\n".join(map(str, results))


def test_a_kernel_without_a_gradient_is_caught():
    problem = replace(BASE, return_lse=False)

    def call(x):
        return naive_attention(x.query, x.key.detach(), x.value.detach(), None, scale=0.25)[0]

    (results,) = differences(problem, build(problem, seed=1), call)
    assert {result.name for result in results if not result} == {"dk", "dv"}


def test_a_missing_lse_is_caught():
    problem = replace(BASE, requires_grad=False)
    (results,) = differences(problem, build(problem, seed=1), lambda x: by_naive(x)[0])
    assert [str(result) for result in results if not result] == ["lse: is missing"]


def test_the_kit_needs_no_hypothesis():
    code = (
        "import sys\n"
        "from attn_core.testing import budget, differences, naive, problems\n"
        "assert 'hypothesis' not in sys.modules and 'pytest' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# build


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_gives_the_same_numbers_in_every_layout(layout):
    one, two = build(BASE, seed=3), build(BASE, seed=3, layout=layout)
    for name in ("query", "key", "value", "grad_out", "grad_lse"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.query, build(BASE, seed=4).query)
    assert two.query.is_contiguous() == two.key.is_contiguous() == (layout == "contiguous")
    assert two.query.is_leaf
    assert two.query.requires_grad


def test_a_strided_problem_gets_strided_operands_with_nan_between():
    inputs = build(replace(BASE, strided_head_dim=True), seed=3)
    assert {x.stride(-1) for x in (inputs.query, inputs.key, inputs.value)} == {2}
    assert torch.isfinite(inputs.query).all()


def test_biases_are_filled_as_described():
    table = torch.empty(4, 33, 37, dtype=torch.float16, device="meta", requires_grad=True)
    problem = replace(BASE, bias=TensorBias(table).bind(33, 37), bias_requires_grad=True)
    bias = build(problem, seed=3, empty_rows=True).bias
    assert (bias.tensor.shape, bias.tensor.dtype, bias.requires_grad) == (table.shape, torch.float16, True)
    assert (bias.tensor[:, 0] == -INF).all()
    assert torch.isfinite(bias.tensor[:, 1:]).any()


def test_a_bias_of_an_unknown_kind_with_data_must_be_given():
    class Unknown(Causal):
        def held(self):
            return {"which": torch.zeros(3, dtype=torch.int64)}

    with pytest.raises(TypeError, match="no rule to fill a Unknown; give one with bias="):
        build(replace(BASE, bias=Unknown("top-left").bind(33, 37)), seed=1)
