"""torch/tiled with a head_dim of value that is not query's: zeros beside the narrower one, so that each tile is one of
the fused kernel all the same."""

from __future__ import annotations

import pytest
import torch
from attn_core import (
    ALiBi,
    Causal,
    Neighborhood,
    RelPosTable,
    Segments,
    Window,
    attention,
    explain,
    reference_attention,
)

NAME = "torch/tiled"
SEQLEN = 70
DIMS = [(8, 5), (5, 8), (16, 3)]
BIASES = {
    "none": None,
    "window": Window(9, 4),
    "causal": Causal(),
    "plane": Neighborhood((7, 10), kernel_size=3),
    "documents": Segments([3, 0, 17, 5, 5, 40], within=Causal()),
    "alibi": Window(9, 4) + ALiBi(4),
    "table": Neighborhood((7, 10), kernel_size=3) + RelPosTable(torch.linspace(-1, 1, 100).view(4, 5, 5), (7, 10)),
}


def operands(dim, dim_v):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, dim), (2, dim), (2, dim_v))
    return [torch.randn(2, SEQLEN, *size, generator=generator).double().requires_grad_() for size in sizes]


def results(call, inputs):
    out, lse = call(*inputs)
    return out, lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs)


@pytest.mark.parametrize("dims", DIMS, ids="{0[0]} and {0[1]}".format)
@pytest.mark.parametrize("name", BIASES)
def test_out_lse_and_gradients_are_those_of_the_reference(name, dims):
    bias, inputs = BIASES[name], operands(*dims)
    assert explain(*inputs, bias, return_lse=True, kernel=NAME)[NAME].adaptations == ("pad_head_dim",)
    got = results(lambda q, k, v: attention(q, k, v, bias, kernel=NAME, return_lse=True), inputs)
    want = results(lambda q, k, v: reference_attention(q, k, v, bias), inputs)
    assert got[0].shape == (2, SEQLEN, 4, dims[1])
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["window", "plane"])
def test_the_same_in_a_graph(name):
    torch._dynamo.reset()
    inputs = operands(8, 5)

    def call(query, key, value):
        return attention(query, key, value, BIASES[name], kernel=NAME, return_lse=True)

    got, want = results(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs), results(call, inputs)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)
