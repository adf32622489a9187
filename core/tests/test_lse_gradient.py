"""The LSE of torch/flash on the CPU has a gradient, which the op itself does not give."""

from __future__ import annotations

import pytest
import torch
from attn_core import Causal, TensorBias, attention, explain, reference_attention


def operands(dtype, kv_heads=4):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 5, 4, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def half_masked():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False  # a query without keys
    mask[:, 3] = False
    return TensorBias(mask)


BIASES = {"none": None, "causal": Causal("top-left"), "empty-row": half_masked()}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_gradients_through_out_and_lse_equal_the_reference(bias, kv_heads):
    inputs = operands(torch.float64, kv_heads)
    assert explain(*inputs, bias, return_lse=True).chosen == "torch/flash"

    def loss(out, lse):
        return out.square().sum() + torch.where(lse.isinf(), 0.0, lse).sin().sum()

    got = torch.autograd.grad(loss(*attention(*inputs, bias, return_lse=True)), inputs)
    want = torch.autograd.grad(loss(*reference_attention(*inputs, bias)), inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs = operands(torch.float64)

    def both(*operands):
        return attention(*operands, Causal("top-left"), return_lse=True, kernel="torch/flash")

    assert torch.autograd.gradcheck(both, inputs)


def test_a_second_derivative_is_refused_by_torch_not_wrong():
    inputs = operands(torch.float32)
    out, lse = attention(*inputs, return_lse=True, kernel="torch/flash")
    (grad,) = torch.autograd.grad(lse.sum() + out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.sum().backward()


def test_it_is_traced_into_a_graph():
    inputs = operands(torch.float32)
    traced = torch.compile(lambda *x: attention(*x, return_lse=True), fullgraph=True, backend="aot_eager")
    out, lse = traced(*inputs)
    got = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    out, lse = attention(*inputs, return_lse=True)
    torch.testing.assert_close(got, torch.autograd.grad(out.sum() + lse.sum(), inputs))
