"""Fused calls, plain attention and merging inside a traced graph: fullgraph, and the same numbers as outside."""

from __future__ import annotations

import pytest
import torch
from attn_natten import attention, merge_attentions, na1d, na2d, na3d
from attn_natten.errors import ConstraintError, NoEffectWarning
from attn_natten.no_effect import forget_what_was_said
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(20261121)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(*extents, heads=2, kv_heads=None, dim=8, **options):
    return tuple(torch.randn(2, *extents, n, dim, **options) for n in (heads, kv_heads or heads, kv_heads or heads))


def compiled(function, *, dynamic=None, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


CALLS = {
    "na1d-causal": (lambda q, k, v: na1d(q, k, v, 5, is_causal=True), (16,), {}),
    "na2d": (lambda q, k, v: na2d(q, k, v, (3, 5), dilation=(2, 1)), (8, 7), {}),
    "na2d-stride": (lambda q, k, v: na2d(q, k, v, 4, stride=2, is_causal=(True, False)), (8, 7), {}),
    "na2d-fewer-kv-heads": (lambda q, k, v: na2d(q, k, v, 3), (8, 7), {"heads": 4, "kv_heads": 2}),
    "na2d-lse": (lambda q, k, v: na2d(q, k, v, 3, return_lse=True, backend="torch/tiled")[1], (8, 7), {}),
    "na3d": (lambda q, k, v: na3d(q, k, v, 3, scale=0.0), (4, 5, 3), {}),
    "attention": (lambda q, k, v: attention(q, k, v, is_causal=True, return_lse=True)[0], (16,), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_graph_and_gives_the_same_with_gradients(name):
    function, extents, options = CALLS[name]
    given = [x.requires_grad_() for x in operands(*extents, **options)]
    call, counter = compiled(function, backend="aot_eager")
    got, want = call(*given), function(*given)
    assert counter.frame_count == 1
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), given) for out in (got, want))):
        torch.testing.assert_close(one, other)


def test_rpb_and_additional_keys_are_in_the_same_graph():
    given = [x.requires_grad_() for x in (*operands(6, 5), *operands(4)[1:], torch.randn(2, 5, 5))]

    def function(query, key, value, keys, values, rpb):
        return na2d(query, key, value, 3, rpb=rpb, additional_keys=keys, additional_values=values, return_lse=True)

    call, counter = compiled(function, backend="aot_eager")
    got, want = call(*given), function(*given)
    assert counter.frame_count == 1
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(out.square().sum() + lse.sum(), given) for out, lse in (got, want))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_graph_serves_any_batch_and_another_grid_is_another_graph():
    call, counter = compiled(lambda q, k, v: na2d(q, k, v, 3))
    for batch, extents in ((2, (8, 7)), (5, (8, 7)), (3, (8, 7)), (3, (9, 6))):
        given = [x[:1].expand(batch, -1, -1, -1, -1) for x in operands(*extents)]
        torch.testing.assert_close(call(*given), na2d(*given, 3))
    assert counter.frame_count == 3  # the second is for any batch


def test_merging_is_one_graph():
    outs = [torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 6, 2, requires_grad=True) for _ in range(3)]
    call, counter = compiled(merge_attentions)
    torch.testing.assert_close(call(outs, lses), merge_attentions(outs, lses))
    assert counter.frame_count == 1


def test_what_has_no_effect_is_said_while_the_graph_is_traced():
    given = operands(6, 5)
    call, _ = compiled(lambda q, k, v: na2d(q, k, v, 3, q_tile_shape=(8, 8)))
    forget_what_was_said()
    with pytest.warns(NoEffectWarning, match="q_tile_shape"):
        call(*given)


def test_a_constraint_is_the_same_error_while_the_graph_is_traced():
    call, _ = compiled(lambda q, k, v: na1d(q, k, v, 7))
    with pytest.raises((ConstraintError, torch._dynamo.exc.Unsupported), match="each axis must be at least"):
        call(*operands(6))
