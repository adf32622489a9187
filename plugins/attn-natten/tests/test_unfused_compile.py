"""Unfused operations as operators of torch: in traced graphs, to counters of FLOPs, and without data."""

from __future__ import annotations

import pytest
import torch
from attn_natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk, ops
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

CALLS = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(20261121)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shapes, **options):
    return [torch.randn(shape, **options) for shape in shapes]


def whole(rank, **window):
    qk, av = CALLS[rank]
    rpb = window.pop("rpb", False)

    def call(query, key, value, tokens, table):
        attn = qk(query, key, 3, additional_keys=tokens, rpb=table if rpb else None, **window)
        return av(attn.softmax(-1), value, 3, additional_values=tokens, **window)

    return call


CASES = {
    "1-D": (1, {}),
    "1-D-causal": (1, {"is_causal": True, "dilation": 2}),
    "2-D-rpb": (2, {"rpb": True}),
    "3-D-causal": (3, {"is_causal": (True, False, False)}),
}


def inputs(rank, extent=7, batch=2, **options):
    grid = (batch, 2, *[extent] * rank, 4)
    return draw(grid, grid, grid, (batch, 2, 3, 4), (2, *[5] * rank), requires_grad=True, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_has_no_break_and_gives_the_same_with_gradients(case, backend):
    rank, window = CASES[case]
    call, operands = whole(rank, **window), inputs(rank)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    out, expected = compiled(*operands), call(*operands)
    torch.testing.assert_close(out, expected)
    got, want = (torch.autograd.grad(o.square().sum(), operands, allow_unused=True) for o in (out, expected))
    torch.testing.assert_close(got, want)


def test_one_graph_serves_every_batch_and_length():
    counter = CompileCounterWithBackend("eager")

    def call(query, key, value, tokens):
        attn = na2d_qk(query, key, 3, additional_keys=tokens, is_causal=(True, False))
        return na2d_av(attn.softmax(-1), value, 3, additional_values=tokens, is_causal=(True, False))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width, tokens in ((3, 7, 9, 6), (5, 8, 6, 2), (4, 11, 5, 7)):  # never two of one size
        grid = (batch, 2, height, width, 4)
        operands = draw(grid, grid, grid, (batch, 2, tokens, 4), requires_grad=True)
        out, expected = compiled(*operands), call(*operands)
        torch.testing.assert_close(out, expected)
        got, want = (torch.autograd.grad(o.sum(), operands) for o in (out, expected))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_bad_input_in_a_graph_is_the_same_error():
    compiled = torch.compile(lambda q: na1d_qk(q, q, 9), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"kernel_size=9 \* dilation=1 = 9"):
        compiled(torch.randn(1, 1, 5, 2))


WINDOWS = {
    1: ((7,), [3], [2], [True]),
    2: ((5, 6), [3, 2], [1, 2], [False, True]),
    3: ((3, 4, 3), [2, 3, 3], [1, 1, 1], [False] * 3),
}


@pytest.mark.parametrize("rank", WINDOWS, ids="{}-D".format)
def test_operators_keep_torchs_rules(rank):
    extents, *window = WINDOWS[rank]
    width = int(torch.tensor(window[0]).prod())
    grid, slots = (1, 2, *extents, 3), (1, 2, *extents, width)
    query, key, attn = draw(grid, grid, slots, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.qk, (query, key, *window, 0.0))
    torch.library.opcheck(ops.av, (attn, key, *window))
    torch.library.opcheck(ops.av_transposed, (attn, query, *window))
    torch.library.opcheck(ops.qk_backward, (attn, query, key, *window))


def test_operators_of_the_bias_keep_torchs_rules():
    table, slots = draw((2, 5, 9), (2, 7, 8, 15), dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.rpb, (table, [7, 8], [3, 5], [2, 1]))
    torch.library.opcheck(ops.rpb_transposed, (slots, [3, 5], [2, 1]))


def test_without_data_shapes_and_dtypes_are_known():
    query = torch.empty(2, 3, 8, 9, 16, dtype=torch.bfloat16, device="meta")
    attn = na2d_qk(query, query, (3, 5), additional_keys=query[:, :, 0, :4])
    assert (attn.shape, attn.dtype, attn.device.type) == ((2, 3, 8, 9, 19), torch.bfloat16, "meta")
    out = na2d_av(attn[..., :15], query[..., :7], (3, 5))
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 8, 9, 7), torch.bfloat16, "meta")


def test_an_exported_program_has_the_operators():
    class Layer(torch.nn.Module):
        def forward(self, query, key):
            return na1d_av(na1d_qk(query, key, 3).softmax(-1), key, 3)

    query, key = draw((1, 2, 7, 4), (1, 2, 7, 4))
    program = torch.export.export(Layer(), (query, key))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"attn_natten.qk.default", "attn_natten.av.default"} <= names
    torch.testing.assert_close(program.module()(query, key), Layer()(query, key))


# FLOPs


def counted(call, *operands):
    counter = FlopCounterMode(display=False)
    with counter:
        call(*operands)
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("dilation", [1, 2], ids="dilation {}".format)
def test_only_matrix_products_are_counted(dilation, causal):
    query, key, value = draw(*[(2, 4, 8, 8, 32)] * 2, (2, 4, 8, 8, 16))
    table = torch.randn(4, 5, 5)

    def call(query, key, value):
        rpb = None if causal else table
        attn = na2d_qk(query, key, 3, dilation, is_causal=causal, rpb=rpb)
        return na2d_av(attn.softmax(-1), value, 3, dilation, is_causal=causal)

    assert counted(call, query, key, value) == 2 * 2 * 4 * 64 * 9 * (32 + 16)


def test_additional_tokens_are_counted():
    query, key, value = draw(*[(2, 4, 8, 8, 32)] * 3)
    tokens = torch.randn(2, 4, 5, 32)

    def call(query, key, value):
        attn = na2d_qk(query, key, 3, additional_keys=tokens)
        return na2d_av(attn.softmax(-1), value, 3, additional_values=tokens)

    assert counted(call, query, key, value) == 2 * 2 * 2 * 4 * 64 * (9 + 5) * 32


def test_a_backward_counts_twice_its_forward():
    query, key, value = draw(*[(2, 4, 8, 8, 32)] * 3, requires_grad=True)

    def call(query, key, value):
        na2d_av(na2d_qk(query, key, 3).softmax(-1), value, 3).sum().backward()

    assert counted(call, query, key, value) == 3 * 2 * 2 * 2 * 4 * 64 * 9 * 32
