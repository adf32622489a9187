"""plan(): a choice made once; it means what attention means, and checks that its operands are those it was made for."""

import pytest
import torch
from attn_core import (
    Capabilities,
    Causal,
    InputError,
    InputTypeError,
    Kernel,
    KernelRefusedError,
    KeyPadding,
    Plan,
    PlanError,
    TensorBias,
    UnknownKernelError,
    Window,
    attention,
    explain,
    plan,
    prefer,
    record,
    reference_attention,
    register,
    scaled_dot_product_attention,
)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 4, 16, generator=generator) for n in (6, 8, 8))
    return query, key, value


# Meaning

BIASES = {
    "none": lambda: None,
    "causal": lambda: Causal("bottom-right"),
    "window": lambda: Window(2, 1, "top-left"),
    "padding": lambda: KeyPadding([3, 8]),
    "boolean tensor": lambda: torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) > 0.3,
    "floating tensor": lambda: torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES)
def test_a_plan_equals_attention(operands, make):
    bias = make()
    planned = plan(*operands, bias)
    assert isinstance(planned, Plan)
    expected = attention(*operands, bias)
    torch.testing.assert_close(planned(*operands), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, reference_attention(*operands, bias)[0].float())
    others = tuple(-2 * x for x in operands)  # the choice is kept, not the data
    torch.testing.assert_close(planned(*others), attention(*others, bias), rtol=0, atol=0)
    unchecked = plan(*operands, bias, unchecked=True)
    given = planned._bias
    torch.testing.assert_close(unchecked(*operands, given), expected, rtol=0, atol=0)


def test_a_plan_keeps_the_options(operands):
    options = {"scale": 0.3, "softcap": 5.0, "return_lse": True}
    for got, expected in zip(plan(*operands, **options)(*operands), attention(*operands, **options)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_plan_knows_its_kernel_and_its_problem(operands):
    planned = plan(*operands, Causal("top-left"), kernel="torch/math")
    assert planned.kernel == "torch/math"
    assert planned.problem == explain(*operands, Causal("top-left")).problem
    assert repr(planned).startswith("<Plan: torch/math for batch 2, seqlen 6x8, heads 4, head_dim 16, float32, cpu")


def test_a_plan_differentiates(operands):
    query, key, value = (x.requires_grad_() for x in operands)
    plan(query, key, value)(query, key, value).sum().backward()
    got = [x.grad for x in operands]
    for x in operands:
        x.grad = None
    attention(query, key, value).sum().backward()
    for gradient, x in zip(got, operands):
        torch.testing.assert_close(gradient, x.grad)


def test_heads_first_operands_with_any_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4, 5, 8, generator=generator)
    flat = torch.randn(5, 8, generator=generator)
    for x in (query, query[0, 0], flat):
        planned = plan(x, x, x, layout="heads-first")
        torch.testing.assert_close(planned(x, x, x), scaled_dot_product_attention(x, x, x), rtol=0, atol=0)
    three = torch.randn(4, 5, 8, generator=generator)
    with pytest.raises(InputError, match=r"query: must be \[batch, seqlen, num_heads, head_dim\]"):
        plan(three, three, three)


def test_heads_first_operands_with_gqa():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    planned = plan(query, key, key, layout="heads-first", enable_gqa=True)
    expected = scaled_dot_product_attention(query, key, key, enable_gqa=True)
    torch.testing.assert_close(planned(query, key, key), expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="enable_gqa=True"):
        plan(query, key, key, layout="heads-first")


# What it checks

OTHERS = {
    "query.shape": lambda q, k, v: (q[:1], k, v),
    "key.shape": lambda q, k, v: (q, k[:, :4].contiguous(), v),
    "value.shape": lambda q, k, v: (q, k, v[..., :8].contiguous()),
    "query.dtype": lambda q, k, v: (q.double(), k, v),
    "key.dtype": lambda q, k, v: (q, k.half(), v),
    "value.dtype": lambda q, k, v: (q, k, v.bfloat16()),
    "query.device": lambda q, k, v: (q.to("meta"), k, v),
    "key.device": lambda q, k, v: (q, k.to("meta"), v),
    "value.device": lambda q, k, v: (q, k, v.to("meta")),
    "query.stride": lambda q, k, v: (torch.randn(2, 4, 6, 16).transpose(1, 2), k, v),
    "key.stride": lambda q, k, v: (q, torch.randn(2, 8, 4, 32)[..., ::2], v),
    "value.stride": lambda q, k, v: (q, k, v.transpose(1, 2).contiguous().transpose(1, 2)),
    "requires_grad": lambda q, k, v: (q, k.clone().requires_grad_(), v),
}


@pytest.mark.parametrize(("field", "change"), OTHERS.items(), ids=OTHERS)
def test_operands_of_another_kind_are_refused_by_name(operands, field, change):
    planned = plan(*operands)
    with pytest.raises(PlanError, match="make another plan") as error:
        planned(*change(*operands))
    told = [line.strip().partition(":")[0] for line in str(error.value).splitlines()[1:]]
    assert told == [field]
    planned(*operands)  # it goes on with the right ones


def test_all_differences_are_told_at_once_with_both_values(operands):
    query, key, value = operands
    with pytest.raises(PlanError) as error:
        plan(*operands)(query.double(), key[:, :4], value)
    assert "key.shape: made for [2, 8, 4, 16], got [2, 4, 4, 16]" in str(error.value)
    assert "query.dtype: made for torch.float32, got torch.float64" in str(error.value)


def test_a_plan_for_gradients_is_not_one_for_none(operands):
    query, key, value = operands
    planned = plan(query.requires_grad_(), key, value)
    planned(query, key, value)
    with torch.no_grad(), pytest.raises(PlanError, match="requires_grad: made for True, got False"):
        planned(query, key, value)


def test_a_plan_for_strided_operands_refuses_contiguous_ones():
    strided = torch.randn(2, 4, 6, 16).transpose(1, 2)
    planned = plan(strided, strided, strided)
    planned(strided, strided, strided)
    contiguous = strided.contiguous()
    with pytest.raises(PlanError, match=r"query\.stride"):
        planned(contiguous, strided, strided)


# Biases


def test_a_bias_that_holds_data_may_be_given_anew(operands):
    first, second = torch.randn(2, 6, 8).unbind(0)
    planned = plan(*operands, first)
    torch.testing.assert_close(planned(*operands), attention(*operands, first), rtol=0, atol=0)
    for bias in (second, TensorBias(second)):
        torch.testing.assert_close(planned(*operands, bias), attention(*operands, second), rtol=0, atol=0)
    torch.testing.assert_close(planned(*operands), attention(*operands, first), rtol=0, atol=0)
    padded = plan(*operands, KeyPadding([3, 8]))
    other = KeyPadding([8, 1])
    torch.testing.assert_close(padded(*operands, other), attention(*operands, other), rtol=0, atol=0)


ANOTHER = {
    "shape": torch.randn(1, 8),
    "dtype": torch.randn(6, 8).double(),
    "boolean": torch.randn(6, 8) > 0,
    "requires_grad": torch.randn(6, 8).requires_grad_(),
    "kind": Window(2, 0),
}


@pytest.mark.parametrize("bias", ANOTHER.values(), ids=ANOTHER)
def test_a_bias_of_another_kind_is_refused(operands, bias):
    planned = plan(*operands, torch.randn(6, 8))
    with pytest.raises(PlanError, match=r"plan: made for bias TensorBias\(\[6, 8\] float32\), got .*make another plan"):
        planned(*operands, bias)


def test_a_plan_without_a_bias_refuses_one_and_another_corner_is_another_bias(operands):
    with pytest.raises(PlanError, match="made for bias None, got TensorBias"):
        plan(*operands)(*operands, torch.randn(6, 8))
    with pytest.raises(PlanError, match=r'made for bias Causal\("top-left"\), got Causal\("bottom-right"\)'):
        plan(*operands, Causal("top-left"))(*operands, Causal("bottom-right"))


# Choosing


def test_a_plan_is_made_under_the_scope_and_stays_what_it_is(operands):
    with prefer("torch/reference"):
        planned = plan(*operands)
    assert planned.kernel == "torch/reference"
    with prefer("torch/math"), record() as calls:
        planned(*operands)
    assert calls.kernels == {"torch/reference": 1}


def test_a_plan_explains_its_choice_under_the_settings_it_was_made_with(operands):
    with prefer("torch/reference"):
        planned = plan(*operands)
    assert planned.explain().chosen == planned.kernel
    assert planned.explain().prefer == ("torch/reference",)
    assert len(list(planned.explain())) > 1
    forced = plan(*operands, kernel="torch/math")
    assert forced.explain().chosen == "torch/math"


def test_a_plan_raises_what_attention_raises(operands):
    with pytest.raises(UnknownKernelError, match="Did you mean 'torch/math'"):
        plan(*operands, kernel="torch/mth")
    with pytest.raises(KernelRefusedError, match="softcap: takes no softcap, got 3"):
        plan(*operands, kernel="torch/math", softcap=3.0)
    with pytest.raises(InputError, match=r"Causal\(\) has no corner"):
        plan(*operands, Causal())
    with pytest.raises(InputError, match='layout: must be "heads-last" or "heads-first"'):
        plan(*operands, layout="bhsd")


def test_operands_of_several_dtypes_cannot_be_planned_though_autocast_would_take_them(operands):
    query, key, value = operands
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(query.bfloat16(), key, value)
        with pytest.raises(InputTypeError, match="plan: takes operands of one dtype"):
            plan(query.bfloat16(), key, value)
        torch.testing.assert_close(plan(*operands)(*operands), attention(*operands), rtol=0, atol=0)


class Subclass(torch.Tensor):
    """May mean anything."""


@pytest.mark.parametrize("layout", ["heads-last", "heads-first"])
def test_what_the_core_does_not_model_cannot_be_planned(operands, layout):
    foreign = [x.as_subclass(Subclass) for x in operands]
    with pytest.raises(InputTypeError, match="takes plain tensors"):
        plan(*foreign, layout=layout)


def test_an_error_in_a_planned_run_names_kernel_and_problem(operands):
    def run(query, key, value, *, scale):
        raise OSError("launch failed")

    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={16})
    with register(Kernel(name="toy/raises", run=run, capabilities=cpu)):
        planned = plan(*operands, kernel="toy/raises")
        with pytest.raises(OSError, match="launch failed") as error:
            planned(*operands)
        told = "\n".join(getattr(error.value, "__notes__", map(str, error.value.args)))
        assert "raised by kernel 'toy/raises' on: batch 2, seqlen 6x8" in told
        assert "launch failed" in planned.explain()["toy/raises"].reasons[0]


def test_a_plan_made_without_gradients_is_not_for_operands_that_need_them_later():
    inputs = [torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        made = plan(*inputs)
        made(*inputs)
    with pytest.raises(PlanError, match="requires_grad: made for False, got True"):
        made(*inputs)


# In a graph

IN_GRAPHS = {
    "none": (lambda: None, {}),
    "another kernel": (lambda: Causal("top-left"), {"kernel": "torch/tiled"}),
    "padding": (lambda: KeyPadding([3, 8]), {"kernel": "torch/math"}),
    "floating tensor": (lambda: torch.randn(6, 8, generator=torch.Generator().manual_seed(2)), {"return_lse": True}),
}


@pytest.mark.parametrize(("make", "options"), IN_GRAPHS.values(), ids=IN_GRAPHS)
def test_a_plan_is_part_of_a_graph(operands, make, options):
    inputs = [x.requires_grad_() for x in operands]
    planned = plan(*inputs, make(), **options)
    compiled = torch.compile(lambda *x: planned(*x), fullgraph=True, backend="aot_eager")
    with prefer("torch/reference"):  # what a plan runs was chosen before
        wanted, got = planned(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    out, wanted_out = (result[0] if isinstance(result, tuple) else result for result in (got, wanted))
    for ours, theirs in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted_out.sum(), inputs)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_graph_takes_a_bias_anew(operands):
    planned = plan(*operands, KeyPadding([3, 8]))
    compiled = torch.compile(lambda bias, *x: planned(*x, bias), fullgraph=True, backend="eager")
    for other in (KeyPadding([8, 1]), KeyPadding([5, 5])):
        torch.testing.assert_close(compiled(other, *operands), attention(*operands, other))


@pytest.mark.parametrize("field", ["query.shape", "query.dtype", "query.stride", "requires_grad"])
def test_a_graph_with_other_operands_is_refused_whenever_they_come(operands, field):
    planned = plan(*operands)
    others = [x.clone() if x.is_contiguous() else x for x in OTHERS[field](*operands)]
    compiled = torch.compile(lambda *x: planned(*x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*operands), planned(*operands), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="not those it was made for; make another plan"):
        compiled(*others)
    torch.testing.assert_close(compiled(*operands), planned(*operands), rtol=0, atol=0)


def test_a_kernel_that_is_not_for_graphs_is_named_in_one(operands):
    def run(query, key, value, *, scale):
        return query * 2

    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={16}, compile=False)
    with register(Kernel(name="toy/eager", run=run, capabilities=cpu)):
        planned = plan(*operands, kernel="toy/eager")
        assert torch.equal(planned(*operands), operands[0] * 2)
        with pytest.raises(RuntimeError, match=r"toy/eager cannot be part of a graph .*; call attention there"):
            torch.compile(lambda *x: planned(*x), fullgraph=True, backend="eager")(*operands)
