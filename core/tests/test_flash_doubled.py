"""torch/fa-window and torch/varlen over a double of torch's ops: what we tell these is what was meant, backward too.

The double itself is held against what FlashAttention states in its README and the limits that are in its source.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import (
    ALiBi,
    Cached,
    Causal,
    KernelRefusedError,
    KeyPadding,
    Paged,
    Problem,
    Segments,
    Window,
    attention,
    flops,
    kernel,
    reference_attention,
)
from attn_core.conformance import check_kernel
from attn_core.conformance.checks import CHECKS
from attn_core.torch_kernels import fa_window, flash_limits, packed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_ops_doubled import KERNELS, Asked, doubled, limits, logits_of, registered

FA, VARLEN = "torch/fa-window", "torch/varlen"
needs_varlen = pytest.mark.skipif(
    VARLEN not in KERNELS, reason=f"torch {torch.__version__} has no varlen_attn with pages"
)
CLOSE = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture
def called():
    with doubled() as called, registered():
        yield called


def drawn(seqlen_q, seqlen_kv, *, batch=2, heads=4, kv_heads=4, dim=16, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim)
    made = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in made]


def check(name, operands, bias, **options):
    """Output, LSE, and gradients where they are asked for, beside the reference's."""
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in operands]
    wanted, wanted_lse = reference_attention(*wide, bias, **options)
    if not operands[0].requires_grad:
        out, lse = attention(*operands, bias, kernel=name, return_lse=True, **options)
        torch.testing.assert_close(lse.double(), wanted_lse, **CLOSE)
    else:
        out = attention(*operands, bias, kernel=name, **options)
    torch.testing.assert_close(out.double(), wanted, **CLOSE)
    if operands[0].requires_grad:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        got = torch.autograd.grad(out, operands, grad.to(out.dtype))
        for one, other in zip(got, torch.autograd.grad(wanted, wide, grad.to(out.dtype).double())):
            torch.testing.assert_close(one.double(), other, rtol=3e-2, atol=3e-2)


# The double


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "window", "picture"),
    [
        (2, 5, (-1, 0), "####. #####"),
        (5, 2, (-1, 0), ".. .. .. #. ##"),
        (2, 5, (1, 0), "..##. ...##"),
        (3, 3, (0, 1), "##. .## ..#"),
    ],
    ids=["causal, more keys", "causal, more queries", "window to the left", "window to the right"],
)
def test_the_double_masks_as_flash_attention_draws_it(seqlen_q, seqlen_kv, window, picture):
    query, key, _ = drawn(seqlen_q, seqlen_kv)
    left, right = limits(*window, False, seqlen_q, seqlen_kv, False)
    _, counts = logits_of(query, key, Asked(1.0, left, right, None, 0.0, 0), None)
    assert " ".join("".join("#" if one else "." for one in row) for row in counts) == picture


def test_the_double_reports_an_lse_of_plus_infinity_where_a_query_sees_no_key():
    with doubled():
        query, key, value = drawn(5, 2)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, 5, 2, 0.0, True, False, scale=1.0
        )
    assert lse[:, :, :3].isposinf().all()
    assert lse[:, :, 3:].isfinite().all()
    assert (out[:, :3] == 0).all()


def test_the_double_is_taken_away_again():
    with doubled():
        pass
    query, key, value = drawn(3, 3)
    with pytest.raises(NotImplementedError):
        torch.ops.aten._flash_attention_forward(query, key, value, None, None, 3, 3, 0.0, False, False)
    assert all(kernel(name).declarations[0].devices == {"cuda"} for name in KERNELS)


# Windows


def test_a_window_is_taken_just_where_the_op_reads_it_as_we_mean_it():
    """Every window on lengths of up to 6: what is taken is the same mask, and what is refused would not be."""
    base = Problem(
        batch=1, seqlen_q=1, seqlen_kv=1, num_heads=1, num_kv_heads=1, head_dim=8, head_dim_v=8, dtype=torch.float16,
        device="cuda", compute_capability=(9, 0), scale=1.0,
    )  # fmt: skip
    sizes, counted = range(1, 7), [0, 0]
    for seqlen_q, seqlen_kv, left, right in itertools.product(sizes, sizes, (None, *range(7)), (None, *range(7))):
        bias = Window(left, right, "bottom-right").bind(seqlen_q, seqlen_kv).normalize()
        if not isinstance(bias, Window):
            continue
        asked = replace(base, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, bias=bias)
        told = limits(*flash_limits.window_of(bias), False, seqlen_q, seqlen_kv, False)
        query, key = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_kv, 1, 8)
        _, counts = logits_of(query, key, Asked(1.0, *told, None, 0.0, 0), None)
        fields = [refusal.field for refusal in fa_window.KERNEL.refusals(asked)]
        same = torch.equal(counts, bias.materialize())
        assert fields == ([] if same else ["bias"]), (bias, seqlen_q, seqlen_kv)
        counted[same] += 1
    assert min(counted) > 20, counted


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5)], ids=["equal", "more keys", "more queries"])
@pytest.mark.parametrize(
    "bias",
    [
        Causal("bottom-right"),
        Window(3, 0, "bottom-right"),
        Window(2, 1, "bottom-right"),
        Window(None, 2, "bottom-right"),
    ],
    ids=["causal", "left", "both", "right"],
)
def test_fa_window_masks_from_the_bottom_right(called, bias, lengths):
    for grad in (False, True):
        check(FA, drawn(*lengths, kv_heads=2, grad=grad), bias, scale=0.3)


def test_causal_is_told_as_such_and_a_window_by_its_limits(called):
    operands = drawn(6, 9)
    attention(*operands, Causal("bottom-right"), kernel=FA)
    told = called.forward
    assert (told["is_causal"], told["window_size_left"], told["window_size_right"]) == (True, -1, -1)
    attention(*operands, Window(4, 0, "bottom-right"), kernel=FA)
    told = called.forward
    assert (told["is_causal"], told["window_size_left"], told["window_size_right"]) == (False, 4, 0)


def test_dropout_is_the_same_in_the_backward(called):
    query, key, value = drawn(6, 6, grad=True)
    torch.manual_seed(0)
    out = attention(query, key, value, Window(3, 0), kernel=FA, dropout_p=0.4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (grad,) = torch.autograd.grad(out, value, weight)
    # The output is linear in value, with the same weights dropped.
    torch.testing.assert_close((grad.float() * value.float()).sum(), (weight.float() * out.float()).sum(), **CLOSE)
    assert called.backward["dropout_p"] == 0.4


# ALiBi


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5)], ids=["equal", "more keys", "more queries"])
@pytest.mark.parametrize(
    "mask",
    [None, Causal("bottom-right"), Window(3, 1, "bottom-right"), Window(None, 1, "bottom-right")],
    ids=["none", "causal", "window", "right"],
)
def test_alibi_is_exact_and_so_is_its_lse(called, mask, lengths):
    slopes = torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.1, 0.2, 0.3, 0.4]])
    for given in (None, slopes[0], slopes):
        alibi = ALiBi(4, given, "bottom-right")
        check(FA, drawn(*lengths), alibi if mask is None else mask + alibi, scale=0.3)


def test_alibi_beside_causal_is_not_told_as_causal_whose_lse_is_another(called):
    attention(*drawn(6, 9), Causal("bottom-right") + ALiBi(4, corner="bottom-right"), kernel=FA)
    told = called.forward
    assert (told["is_causal"], told["window_size_left"], told["window_size_right"]) == (False, 8, 0)


def test_alibi_has_no_backward():
    query, key, value = drawn(4, 4, grad=True)
    with doubled(), registered(), pytest.raises(KernelRefusedError, match="backward.biases"):
        attention(query, key, value, ALiBi(4), kernel=FA)


# Documents


DOCUMENTS = {
    "equal": Segments([4, 3, 5]),
    "causal": Segments([4, 3, 5], within=Causal()),
    "unequal": Segments([4, 3, 5], [2, 6, 1]),
    "unequal, causal": Segments([4, 3, 5], [2, 6, 1], within=Causal("bottom-right")),
    "unequal, window without a right limit": Segments([4, 3, 5], [2, 6, 1], within=Window(1, None, "bottom-right")),
    "window to the right beyond the keys": Segments([1, 3, 8], [2, 1, 1], within=Window(0, 4, "bottom-right")),
    "window on both sides": Segments([4, 3, 5], within=Window(1, 1)),
    "window said from the top left": Segments([2, 3, 1], [4, 5, 3], within=Window(0, 2, "top-left")),
    "some without queries": Segments([6, 0, 6], [2, 3, 4]),
    "some without keys": Segments([6, 1, 5], [2, 0, 7]),
    "at most one query, some without": Segments([1, 0, 1], [2, 3, 4]),
    "one query each": Segments([1, 1, 1], [2, 3, 4]),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("what", DOCUMENTS)
def test_documents_see_nothing_of_each_other(called, name, what):
    bias = DOCUMENTS[what]
    lengths = sum(bias.seqlens_q), sum(bias.seqlens_kv)
    for grad in (False, True):
        check(name, drawn(*lengths, kv_heads=2, grad=grad), bias, scale=0.3)


@needs_varlen
@pytest.mark.parametrize("batch", [1, 3])
def test_documents_are_told_once_per_batch_entry(called, batch):
    attention(*drawn(12, 9, batch=batch), Segments([4, 3, 5], [2, 6, 1]), kernel=VARLEN)
    told = called.forward
    assert told["cum_seq_q"].tolist() == [12 * b + at for b in range(batch) for at in (0, 4, 7)] + [12 * batch]
    assert told["cum_seq_k"].tolist() == [9 * b + at for b in range(batch) for at in (0, 2, 8)] + [9 * batch]
    assert (told["max_q"], told["max_k"], told["seqused_k"]) == (5, 6, None)


def test_alibi_in_documents_counts_from_the_end_of_each(called):
    check(FA, drawn(12, 12), Segments([4, 3, 5], within=Causal()) + ALiBi(4), scale=0.3)
    on_one_diagonal = Segments([3, 4], [5, 4]) + ALiBi(4, corner="bottom-right")
    check(FA, drawn(7, 9), on_one_diagonal, scale=0.3)


@needs_varlen
def test_documents_with_gaps_are_read_by_their_lengths(called):
    bias = Segments([3, 4], [2, 3], starts_kv=[1, 6], within=Causal("bottom-right"))
    query, key, value = drawn(7, 12)
    wanted, _ = reference_attention(query, key, value, bias)
    for tensor in (key, value):
        tensor[:, [0, 3, 4, 5, 9, 10, 11]] = float("nan")
    out = attention(query, key, value, bias, kernel=VARLEN)
    torch.testing.assert_close(out.double(), wanted, **CLOSE)
    assert called.forward["seqused_k"].tolist() == [2, 3, 2, 3]


@needs_varlen
def test_where_a_gradient_is_needed_keys_that_exist_are_put_together(called):
    bias = Segments([3, 4], [2, 3], starts_kv=[1, 6], within=Causal("bottom-right"))
    query, key, value = drawn(7, 12, grad=True)
    check(VARLEN, (query, key, value), bias, scale=0.3)
    assert called.forward["seqused_k"] is None
    assert called.forward["cum_seq_k"].tolist() == [0, 2, 5, 7, 10]
    gone = [0, 3, 4, 5, 9, 10, 11]
    with torch.no_grad():
        for tensor in (key, value):
            tensor[:, gone] = float("nan")
    out = attention(query, key, value, bias, kernel=VARLEN)
    for grad in torch.autograd.grad(out.float().square().sum(), (key, value)):
        assert (grad[:, gone] == 0).all()
        assert grad.isfinite().all()


# Lengths and pages

WITHIN = {
    "all": None,
    "causal": Causal("bottom-right"),
    "window": Window(2, 0, "bottom-right"),
    "no right limit": Window(1, None, "bottom-right"),
}


@needs_varlen
@pytest.mark.parametrize("grouped", [4, 1], ids=["equal heads", "one kv head"])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
def test_lengths_and_pages_are_those_of_each_sequence(called, within, seqlen_q, grouped):
    query, key, value = drawn(seqlen_q, 8, batch=4, kv_heads=grouped)
    lengths = torch.tensor([8, 3, 0, 1])
    for grad in (False, True):
        operands = [tensor.requires_grad_(grad) for tensor in (query, key, value)]
        check(VARLEN, operands, Cached(lengths, within=within), scale=0.3)
        if within is None:
            check(VARLEN, operands, KeyPadding(lengths), scale=0.3)
    query.requires_grad_(False)
    table, lengths = torch.tensor([[2, 0], [1, -1], [-1, -1], [2, 99]]), torch.tensor([300, 5, 0, 256])
    pages = [torch.randn(3, 256, grouped, 16, generator=torch.Generator().manual_seed(3)) for _ in "kv"]
    bias = Paged(table, lengths, 256, within=within)
    check(VARLEN, (query, *(page.to(torch.bfloat16) for page in pages)), bias, scale=0.3)


def test_what_lies_on_a_device_is_clamped_before_the_op_reads_by_it():
    """Lengths and pages on a device are not looked at; wrong ones must not lead out of the operands."""
    query, key = torch.zeros(2, 1, 4, 16), torch.zeros(3, 256, 4, 16)
    bias = Paged(torch.tensor([[7, -5], [0, 1]]), torch.tensor([900, -3]), 256).at((1, 512))
    told = packed.packed(bias, query, key)
    assert told.used_kv.tolist() == [512, 0]
    assert told.pages.tolist() == [[2, 0], [0, 1]]
    assert told.used_kv.dtype == told.pages.dtype == torch.int32


def test_documents_are_told_by_tensors_that_are_kept():
    query = torch.zeros(2, 12, 4, 16)
    bias = Segments([4, 3, 5]).bind(12, 12)
    assert packed.packed(bias, query, query) is packed.packed(bias, query, query)


# FLOPs


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        result = call()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        result.float().sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("lengths", [(5, 12), (12, 5)], ids=["more keys", "more queries"])
def test_flops_of_a_dense_call_are_those_of_its_tokens_not_of_its_heads(called, lengths):
    operands = drawn(*lengths, kv_heads=2, grad=True)
    pairs = 2 * 4 * lengths[0] * lengths[1]  # batch, heads
    call = lambda: attention(*operands, Causal("bottom-right"), kernel=FA)  # noqa: E731
    assert counted(call) == (2 * pairs * 2 * 16, 2 * pairs * 5 * 16)


@pytest.mark.parametrize("name", KERNELS)
def test_flops_of_documents_are_those_of_each(called, name):
    operands = drawn(12, 9, grad=True)
    pairs = 2 * 4 * (4 * 2 + 3 * 6 + 5 * 1)
    call = lambda: attention(*operands, Segments([4, 3, 5], [2, 6, 1]), kernel=name)  # noqa: E731
    assert counted(call) == (2 * pairs * 2 * 16, 2 * pairs * 5 * 16)


@needs_varlen
def test_flops_in_pages_are_those_of_the_keys_that_exist(called):
    query, pages = drawn(3, 2)[0], torch.zeros(2, 256, 4, 16, dtype=torch.bfloat16)
    bias = Paged(torch.tensor([[0], [1]]), torch.tensor([200, 7]), 256)
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        attention(query, pages, pages, bias, kernel=VARLEN)
    assert counter.get_total_flops() == 2 * 4 * 3 * (200 + 7) * 2 * 16


# Graphs


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        (FA, Window(3, 1)),
        (FA, Segments([4, 5], within=Causal())),
        pytest.param(VARLEN, Segments([4, 5], within=Causal()), marks=needs_varlen),
    ],
    ids=["window", "documents", "varlen"],
)
def test_a_graph_takes_it_whole_with_its_backward(called, name, bias):
    operands = drawn(9, 9, grad=True)
    torch._dynamo.reset()

    def call(query, key, value):
        return attention(query, key, value, bias, kernel=name)

    want = call(*operands)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(got, want, **CLOSE)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), operands) for out in (got, want))):
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        (FA, lambda: Window(3, 1, "bottom-right")),
        pytest.param(
            VARLEN, lambda: Cached(torch.tensor([4, 7]), within=Window(2, 0, "bottom-right")), marks=needs_varlen
        ),
    ],
    ids=["window", "lengths"],
)
def test_one_graph_serves_every_length(called, name, made):
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    bias = made()

    def call(query, key, value, bias):
        return attention(query, key, value, bias, kernel=name)

    call(*drawn(9, 14), bias)  # plugins are found at the first call, which is a change that graphs look at
    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    for lengths in ((9, 14), (11, 17), (10, 30)):
        operands = drawn(*lengths)
        torch.testing.assert_close(compiled(*operands, bias), call(*operands, bias), **CLOSE)
    assert graphs.frame_count == 1


# The kit


@pytest.mark.parametrize("name", KERNELS)
def test_the_kit_finds_that_what_is_declared_is_kept(called, name):
    here = [check.name for check in CHECKS.values() if check.group in ("honesty", "contract")]
    slow = {"can_be_traced"}
    results = [result for check in here if check not in slow for result in check_kernel(name, only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 20


def test_the_registry_is_as_it_was(called):
    assert {each.name for each in attn_core.kernels("torch/*")} >= set(KERNELS)
