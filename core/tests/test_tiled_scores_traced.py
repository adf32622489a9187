"""torch/tiled with scores in graphs: one op, to which what the rules hold are operands with gradients."""

from __future__ import annotations

import pytest
import torch
from attn_core import ALiBi, Causal, Neighborhood, RelPosTable, Segments, Window, attention
from attn_core.torch_kernels.tiling.written import put_together, taken_apart

NAME = "torch/tiled"
HEADS = 4


def slopes():
    return torch.linspace(0.1, 0.5, HEADS).requires_grad_()


def table(*sizes):
    return torch.randn(HEADS, *sizes, generator=torch.Generator().manual_seed(0)).requires_grad_()


#: name -> (what makes the bias of a tensor, that tensor or None, lengths)
KINDS = {
    "alibi": (lambda held: ALiBi(HEADS), None, (70, 40)),
    "slopes": (lambda held: ALiBi(HEADS, held), slopes, (70, 40)),
    "causal": (lambda held: Causal() + ALiBi(HEADS, held), slopes, (70, 300)),
    "documents": (lambda held: Segments([3, 0, 17, 50]) + ALiBi(HEADS, held), slopes, (70,)),
    "plane": (
        lambda held: Neighborhood((7, 10), kernel_size=3) + RelPosTable(held, (7, 10)),
        lambda: table(5, 5),
        (70,),
    ),
    "two": (lambda held: Window(4, 2) + RelPosTable(held, 70) + ALiBi(HEADS), lambda: table(9), (70,)),
}


def operands(seqlen, grad=True):
    generator = torch.Generator().manual_seed(seqlen)
    return [torch.randn(2, seqlen, n, 8, generator=generator).requires_grad_(grad) for n in (HEADS, 2, 2)]


class Graphs:
    """A backend that keeps the names of the ops of each graph."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        self.ops.append([str(node.target) for node in graph.graph.nodes if "attn_core" in str(node.target)])
        return graph


@pytest.mark.parametrize(
    ("name", "built"), [*((name, "inside") for name in KINDS), ("causal", "argument"), ("plane", "argument")]
)
def test_a_graph_has_one_op_and_gives_what_eager_does_with_gradients(name, built):
    make, hold, lengths = KINDS[name]
    held = None if hold is None else hold()
    torch._dynamo.reset()
    graphs = Graphs()

    def inside(held, *inputs):
        return attention(*inputs, make(held), kernel=NAME, return_lse=True)

    def given(bias, *inputs):
        return attention(*inputs, bias, kernel=NAME, return_lse=True)

    compiled = torch.compile(inside if built == "inside" else given, fullgraph=True, backend=graphs)
    for seqlen in lengths:
        inputs = operands(seqlen)
        got = compiled(held if built == "inside" else make(held), *inputs)
        want = inside(held, *inputs)
        torch.testing.assert_close(got, want)
        wanted = [*inputs, *([] if held is None else [held])]
        grads = [torch.autograd.grad(out.square().sum() + lse.sin().sum(), wanted) for out, lse in (got, want)]
        torch.testing.assert_close(*grads)
    assert len(graphs.ops) <= 2
    assert all(len(ops) == 1 and ops[0].startswith("attn_core.tiled") for ops in graphs.ops)


@pytest.mark.parametrize("name", ["slopes", "plane"])
def test_it_is_compiled_with_its_backward(name):
    make, hold, lengths = KINDS[name]
    held, inputs = hold(), operands(lengths[0])
    torch._dynamo.reset()

    def call(held, *inputs):
        return attention(*inputs, make(held), kernel=NAME).square()

    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(held, *inputs), call(held, *inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), [*inputs, held]) for out in (got, want)))


def test_a_module_that_trains_its_slopes_is_exported_for_every_length():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slopes = torch.nn.Parameter(slopes().detach())

        def forward(self, query, key, value):
            return attention(query, key, value, Causal() + ALiBi(HEADS, self.slopes), kernel=NAME)

    layer, inputs = Layer(), tuple(operands(64, False))
    dim = torch.export.Dim("seqlen", min=4, max=4096)
    program = torch.export.export(layer, inputs, dynamic_shapes=({1: dim},) * 3, strict=False)
    for seqlen in (16, 200):
        inputs = operands(seqlen, False)
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


@pytest.mark.parametrize("name", KINDS)
def test_the_op_declares_what_it_does(name):
    """Shapes, strides and dtypes of the fake, the registration of its gradient, and that it alters no operand."""
    make, hold, lengths = KINDS[name]
    bias = make(None if hold is None else hold()).bind(lengths[0], lengths[0]).normalize()
    inputs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in operands(lengths[0])]
    text, held = taken_apart(bias)
    held = [tensor.detach().requires_grad_() for tensor in held]
    found = torch.library.opcheck(torch.ops.attn_core.tiled.default, (*inputs, held, text, 0.3))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", KINDS)
def test_rules_are_read_as_they_were_written(name):
    make, hold, lengths = KINDS[name]
    bias = make(None if hold is None else hold()).bind(lengths[0], lengths[0])
    assert put_together(*taken_apart(bias), 2, HEADS, bias.lengths) == bias
