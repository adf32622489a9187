"""The numerics class, by a kernel that really computes in int8: fast by its own account, near, and not exact.

It takes part nowhere unless the caller allows it, whichever way a call goes, and whatever prefers it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import (
    Backward,
    Capabilities,
    Cost,
    Kernel,
    KernelRefusedError,
    allow,
    attention,
    explain,
    plan,
    prefer,
    record,
    reference_attention,
    register,
    scaled_dot_product_attention,
)
from attn_core.conformance import check_kernel

NAME = "toy/int8"


def int8(tensor):
    """(whole numbers of 8 bits, the size of one) of each row."""
    size = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    return (tensor / size).round().to(torch.int8), size


def run(query, key, value, *, scale):
    """Heads-first; logits are products of int8, summed in int32."""
    (q, of_q), (k, of_k) = int8(query), int8(key)
    logits = torch.matmul(q.int(), k.int().transpose(-1, -2)) * of_q * of_k.transpose(-1, -2) * scale
    return (logits.softmax(-1) @ value.float()).to(value.dtype)


TOY = Kernel(
    name=NAME,
    run=run,
    capabilities=Capabilities(
        devices={"cpu"},
        dtypes={torch.float32},
        head_dims={16, 32},
        deterministic=True,
        compile=True,
        numerics="approximate",
    ),
    layout="heads-first",
    costs={"cpu": Cost(call=0.0)},
)


@pytest.fixture
def toy():
    with register(TOY):
        yield


def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 20, 3, 16, generator=generator) for _ in "qkv"]


def kernels_of(call):
    with record() as calls:
        call()
    return calls.kernels


WAYS = {
    "attention": lambda: attention(*operands()),
    "scaled_dot_product_attention": lambda: scaled_dot_product_attention(*(x.transpose(1, 2) for x in operands())),
    "plan": lambda: plan(*operands())(*operands()),
    "graph": lambda: torch.compile(attention, fullgraph=True, backend="eager")(*operands()),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_never_chosen_unless_the_caller_allows_it(toy, way):
    call = WAYS[way]
    assert NAME not in kernels_of(call)
    with prefer(NAME, "torch/math"):
        assert set(kernels_of(call)) == {"torch/math"}
    with allow("approximate"):
        assert set(kernels_of(call)) == {NAME}
    assert NAME not in kernels_of(call)


def test_explain_names_it_as_left_out_with_the_way_to_let_it_in(toy):
    told = explain(*operands())
    assert told.chosen != NAME
    assert (told[NAME].state, told[NAME].refused_fields) == ("refused", ("numerics",))
    (line,) = [line for line in str(told).splitlines() if line.startswith(NAME)]
    assert 'is approximate; allowed within `with allow("approximate")` or by ATTN_ALLOW=approximate' in line


def test_who_insists_on_it_without_allowing_it_gets_the_reason(toy):
    for insisting in (
        lambda: attention(*operands(), kernel=NAME),
        lambda: plan(*operands(), kernel=NAME),
    ):
        with pytest.raises(KernelRefusedError, match="is approximate; allowed within"):
            insisting()
    with prefer(NAME, strict=True), pytest.raises(KernelRefusedError, match="is approximate; allowed within"):
        attention(*operands())


def test_being_allowed_it_still_refuses_what_it_does_not_declare(toy):
    query, key, value = operands()
    with allow("approximate"):
        assert explain(query.double(), key.double(), value.double())[NAME].refused_fields == ("dtype",)
        assert "backward" in explain(query.requires_grad_(), key, value)[NAME].refused_fields


def test_its_error_is_that_of_int8():
    query, key, value = operands()
    with register(TOY), allow("approximate"):
        got = attention(query, key, value)
    error = (got - reference_attention(query, key, value)[0]).norm() / got.norm()
    assert 1e-4 < error < 0.05


# The kit


class Trained(torch.autograd.Function):
    """A forward in int8, and a backward times a factor."""

    factor = 1.0

    @staticmethod
    def forward(ctx, query, key, value, scale):
        ctx.scale = scale
        ctx.save_for_backward(query, key, value)
        return run(query, key, value, scale=scale)

    @classmethod
    def backward(cls, ctx, grad):
        query, key, value = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = (query @ key.transpose(-1, -2) * ctx.scale).softmax(-1) @ value
        return *(x * cls.factor for x in torch.autograd.grad(out, (query, key, value), grad)), None


class Twice(Trained):
    factor = 2.0


def trained(function):
    def run_of_it(query, key, value, *, scale):
        return function.apply(query, key, value, scale)

    declared = replace(TOY.capabilities, backward=Backward(), compile=False)
    return replace(TOY, run=run_of_it, capabilities=declared)


def test_the_kit_holds_it_to_its_class_without_being_allowed_to():
    here = ("takes_what_it_claims", "refuses_what_it_does_not_claim", "a_call_that_it_refuses_raises", "agrees")
    results = [result for check in here for result in check_kernel(TOY, only=check)]
    assert not [str(result) for result in results if not result]
    assert sum(result.status == "passed" for result in results) > 10
    with pytest.raises(KernelRefusedError), register(TOY):
        attention(*operands(), kernel=NAME)


def test_the_kit_finds_that_it_is_no_exact_kernel():
    exact = replace(TOY, capabilities=replace(TOY.capabilities, numerics="exact"))
    assert any(result.status == "failed" and "out" in result.reason for result in check_kernel(exact, only="agrees"))


def test_the_kit_finds_an_approximate_kernel_that_is_not_near():
    def far(query, key, value, *, scale):
        return run(query, key, value, scale=scale * 2)

    results = check_kernel(replace(TOY, run=far), only="agrees")
    assert any("out: error" in result.reason and "for an approximate kernel" in result.reason for result in results)


def test_the_kit_looks_at_the_gradients_of_an_approximate_kernel_too():
    assert all(check_kernel(trained(Trained), only="agrees"))
    results = check_kernel(trained(Twice), only="agrees")
    failed = [result.reason for result in results if not result]
    assert len(failed) == sum(result.status != "skipped" for result in results) > 10
    assert all("dv: error" in reason and "out: error" not in reason for reason in failed)
