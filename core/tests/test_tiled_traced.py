"""torch/tiled in graphs: one op, one graph for every length, exported in both modes."""

from __future__ import annotations

import pytest
import torch
from attn_core import Causal, Neighborhood, PrefixLM, Segments, Window, attention
from attn_core.torch_kernels.tiling.written import put_together, taken_apart
from torch._subclasses.fake_tensor import FakeTensorMode

NAME = "torch/tiled"
GRIDS = {
    "neighborhood": (Neighborhood((7, 10), kernel_size=3, dilation=(2, 1)), (70,)),
    "documents": (Segments([3, 0, 17, 5, 5, 40], within=Window(4, 2)), (70,)),
}
MASKS = {
    "window": (Window(4, 4), (70, 40, 100)),
    "causal": (Causal("bottom-right"), (70, 40, 100)),
    "intersection": (Window(4, 3) & Causal(), (70, 40, 100)),
    "prefix": (PrefixLM(7), (70, 40, 100)),
    **GRIDS,
}


def operands(seqlen, requires_grad=True):
    generator = torch.Generator().manual_seed(seqlen)
    return [torch.randn(2, seqlen, n, 8, generator=generator).requires_grad_(requires_grad) for n in (4, 2, 2)]


class Graphs:
    """A backend that counts graphs and the ops named in them."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        self.ops.append([str(node.target) for node in graph.graph.nodes if "attn_core" in str(node.target)])
        return graph


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_one_graph_with_one_op_serves_every_length(name, dynamic):
    mask, lengths = MASKS[name]
    torch._dynamo.reset()
    graphs = Graphs()

    def call(query, key, value):
        return attention(query, key, value, mask, kernel=NAME, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=graphs)
    for seqlen in lengths:
        inputs = operands(seqlen)
        got, want = compiled(*inputs), call(*inputs)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs) for out, lse in (got, want)]
        torch.testing.assert_close(*grads)
    if dynamic:
        assert graphs.ops == [["attn_core.tiled"]] or graphs.ops == [["attn_core.tiled.default"]]
    else:
        assert 1 <= len(graphs.ops) <= 2


@pytest.mark.parametrize("name", ["window", "neighborhood"])
def test_it_is_compiled_with_its_backward(name):
    mask, lengths = MASKS[name]
    torch._dynamo.reset()

    def call(query, key, value):
        return attention(query, key, value, mask, kernel=NAME).square()

    inputs = operands(lengths[0])
    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), inputs) for out in (got, want)))


@pytest.mark.parametrize(
    ("strict", "dim"),
    [(False, "bounded"), (False, "auto"), (True, "auto")],
    ids=["non-strict-bounded", "non-strict-auto", "strict-auto"],
)
@pytest.mark.parametrize("name", ["window", "causal"])
def test_a_module_is_exported_for_every_length(name, strict, dim):
    mask, _ = MASKS[name]

    class Layer(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, mask, kernel=NAME)

    size = torch.export.Dim("seqlen", min=4, max=4096) if dim == "bounded" else torch.export.Dim.AUTO
    program = torch.export.export(Layer(), tuple(operands(64, False)), dynamic_shapes=({1: size},) * 3, strict=strict)
    for seqlen in (16, 64, 200):
        inputs = operands(seqlen, False)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


@pytest.mark.parametrize("name", MASKS)
def test_the_op_declares_what_it_does(name):
    """Shapes, strides and dtypes of the fake, the registration of its gradient, and that it alters no operand."""
    mask, lengths = MASKS[name]
    bound = mask.bind(lengths[0], lengths[0]).normalize()
    text, held = taken_apart(bound)
    for transposed in (False, True):
        inputs = [x.detach().transpose(1, 2) for x in operands(lengths[0])]
        inputs = [(x if transposed else x.contiguous()).requires_grad_() for x in inputs]
        torch.library.opcheck(torch.ops.attn_core.tiled.default, (*inputs, held, text, 0.3))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_as_it_was_written(name):
    mask, lengths = MASKS[name]
    bound = mask.bind(lengths[0], lengths[0]).normalize()
    assert put_together(*taken_apart(bound), 2, 4, bound.lengths) == bound


def test_fake_tensors_get_an_answer():
    with FakeTensorMode():
        out, lse = attention(*operands(40), Window(3, 3), kernel=NAME, return_lse=True)
    assert out.shape == (2, 40, 4, 8)
    assert lse.shape == (2, 4, 40)
