"""Padding that holds zeros is none: what remains is a mask of its rule alone, and any kernel of masks takes it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from attn_core import (
    ALiBi,
    Backward,
    BlockMask,
    Cached,
    Capabilities,
    Causal,
    Kernel,
    KeyPadding,
    Mask,
    Neighborhood,
    Paged,
    Problem,
    Segments,
    Window,
    attention,
    explain,
    explain_problem,
    kernels,
    record,
    reference_attention,
    register,
)
from attn_core.testing.naive import naive_attention

LENGTHS = (6, 9)
BLOCKS = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]]).bool().repeat(3, 1, 1, 1)
FULL = torch.zeros(3, 1, 3, 3).bool()
FULL[2, 0, :, 1] = True  # the batch entry without keys, but for those that a full block sees
MASKS = {
    "key padding": lambda: KeyPadding([9, 4, 0]),
    "causal and key padding": lambda: Causal("bottom-right") & KeyPadding([9, 4, 0]),
    "cached": lambda: Cached([9, 4, 6], within=Window(2, 0, "bottom-right")),
    "documents with gaps": lambda: Segments([2, 4], [3, 2], within=Causal("top-left"), starts_kv=[1, 6]),
    "documents with gaps, windowed": lambda: (
        Segments([4, 5], [3, 2], starts_kv=[1, 6]) & Neighborhood(9, kernel_size=3)
    ),
    "documents and key padding": lambda: Segments([2, 4], [3, 6]) & KeyPadding([9, 4, 7]),
    "blocks of a padded mask": lambda: BlockMask.from_mask(Causal("bottom-right") & KeyPadding([9, 4, 0]), 6, 9, 2),
    "blocks that are all full or empty": lambda: BlockMask.from_mask(KeyPadding([9, 6, 0]), 6, 9, (2, 3)),
    "blocks with padding within": lambda: BlockMask(BLOCKS, (2, 3), within=KeyPadding([9, 4, 0])),
    "blocks that see padding whole": lambda: BlockMask(BLOCKS, (2, 3), full=FULL, within=KeyPadding([9, 4, 0])),
}


def lengths_of(name):
    return (9, 9) if "windowed" in name else LENGTHS


def operands(seqlen_q, seqlen_kv, valid=None, requires_grad=False):
    """Query, key and value; what `valid` calls padding is NaN and infinite."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, n, heads, 8, generator=generator) for n, heads in ((seqlen_q, 4), (seqlen_kv, 2), (seqlen_kv, 2))
    )
    if valid is not None:
        gone = ~valid.expand(3, -1)
        key[gone], value[gone] = torch.nan, torch.inf
    return [x.requires_grad_(requires_grad) for x in (query, key, value)]


@pytest.mark.parametrize("name", MASKS)
def test_the_rule_stays_and_the_padding_is_gone(name):
    seqlen_q, seqlen_kv = lengths_of(name)
    bound = MASKS[name]().bind(seqlen_q, seqlen_kv)
    bare = bound.without_padding()
    assert bound.has_padding
    assert not bare.has_padding
    assert bare.valid_keys() is None
    assert torch.equal(bare.materialize(), bound.materialize())
    assert bare.pairs() == bound.pairs()
    assert bare.batch_and_heads == bound.batch_and_heads
    for q0, q1, k0, k1 in ((0, 2, 0, 3), (1, 6, 4, 9), (5, 6, 8, 9)):
        assert bare.span(q0, q1) == bound.span(q0, q1)
        assert bare.tile(q0, q1, k0, k1) == bound.tile(q0, q1, k0, k1)
    assert bare.without_padding() is bare


@pytest.mark.parametrize("name", MASKS)
def test_it_is_a_value_with_the_data_of_its_mask(name):
    seqlen_q, seqlen_kv = lengths_of(name)
    bare = MASKS[name]().bind(seqlen_q, seqlen_kv).without_padding()
    again = MASKS[name]().without_padding().bind(seqlen_q, seqlen_kv)
    assert bare == again == pickle.loads(pickle.dumps(bare)) == copy.deepcopy(bare)
    assert hash(bare) == hash(again)
    assert bare.key == again.key != MASKS[name]().bind(seqlen_q, seqlen_kv).key
    assert bare.holds_data == bool(bare.held())
    assert all(tensor.is_meta for tensor in bare.without_data().held().values())
    stand_in = type(bare).from_facts(bare.facts(), *bare.batch_and_heads, (seqlen_q, seqlen_kv))
    assert repr(stand_in.without_data()) == repr(bare.without_data())
    simple = bare.normalize()
    assert not simple.has_padding
    assert torch.equal(simple.materialize(), bare.materialize())


def test_blocks_have_the_padding_of_the_mask_within_but_for_what_full_blocks_see():
    mask, causal = Causal("bottom-right") & KeyPadding([9, 4, 0]), Causal("top-left")
    want = mask.bind(6, 9).valid_keys()
    for block_size in (1, 2, (4, 3), 128):
        assert torch.equal(BlockMask.from_mask(mask, 6, 9, block_size).valid_keys(), want)
    seen_whole = want.clone()
    seen_whole[2, 3:6] = True
    assert torch.equal(MASKS["blocks that see padding whole"]().bind(6, 9).valid_keys(), seen_whole)
    none_seen = BlockMask(torch.zeros_like(BLOCKS), (2, 3), full=FULL, within=KeyPadding([9, 4, 0])).bind(6, 9)
    assert torch.equal(none_seen.valid_keys(), want)
    assert BlockMask(BLOCKS, (2, 3), within=causal).bind(6, 9).valid_keys() is None


def test_what_has_no_padding_and_what_lies_in_pages_stays():
    for bias in (Causal(), ALiBi(2), Segments([3, 3]), Causal() & Window(1, 1), Paged([[0, 1]], [3], 2)):
        assert bias.without_padding() is bias
    both = ALiBi(2) + KeyPadding([3])
    assert both.has_padding
    assert not both.without_padding().has_padding
    assert both.without_padding().parts[0] == ALiBi(2)


@pytest.fixture
def of_masks():
    """A kernel that takes any mask by its rule, and nothing else; padding must not reach it."""

    def run(query, key, value, *, bias=None, scale, return_lse=False):
        assert bias is None or not bias.has_padding
        if not torch.compiler.is_compiling():
            assert bool(key.isfinite().all() & value.isfinite().all()), "padding was not zeroed"
        out, lse = naive_attention(query, key, value, bias, scale=scale)
        return (out, lse) if return_lse else out

    capabilities = Capabilities(
        devices={"cpu"},
        dtypes={torch.float32},
        head_dims={8},
        biases={Mask},
        gqa=True,
        return_lse=True,
        compile=True,
        backward=Backward(lse_grad=True),
    )
    with register(Kernel(name="toy/masks", run=run, capabilities=capabilities)):
        yield "toy/masks"


@pytest.mark.parametrize("name", MASKS)
def test_every_kernel_gives_what_the_reference_gives_with_nan_in_the_padding(of_masks, name):
    seqlen_q, seqlen_kv = lengths_of(name)
    mask = MASKS[name]()
    valid = mask.bind(seqlen_q, seqlen_kv).valid_keys()
    clean = operands(seqlen_q, seqlen_kv, requires_grad=True)
    want, want_lse = (x.float() for x in reference_attention(*clean, mask))
    want_grads = torch.autograd.grad(want.square().sum(), clean)
    took = set()
    for each in kernels():
        for grad in (False, True):
            inputs = operands(seqlen_q, seqlen_kv, valid, requires_grad=grad)
            with torch.set_grad_enabled(grad):
                told = explain(*inputs, mask, kernel=each.name)
                if told.chosen is None:
                    continue
                took.add(each.name)
                out = attention(*inputs, mask, kernel=each.name)
                torch.testing.assert_close(out, want, msg=lambda text, k=each.name: f"{k}: {text}")
                if grad:
                    grads = torch.autograd.grad(out.square().sum(), inputs)
                    for got, wanted in zip(grads, want_grads):
                        torch.testing.assert_close(got, wanted, msg=lambda text, k=each.name: f"{k}: {text}")
                    assert all((g[~valid.expand(3, -1)] == 0).all() for g in grads[1:]), each.name
                if explain(*inputs, mask, kernel=each.name, return_lse=True).chosen is not None:
                    _, lse = attention(*inputs, mask, kernel=each.name, return_lse=True)
                    torch.testing.assert_close(lse, want_lse, msg=lambda text, k=each.name: f"{k}: {text}")
    assert took >= {"toy/masks", "torch/tiled", "torch/flex", "torch/flash", "torch/math", "torch/reference"}


@pytest.mark.parametrize("name", MASKS)
def test_a_kernel_of_masks_takes_it_by_zero_padding_alone_and_pays_for_it(of_masks, name):
    seqlen_q, seqlen_kv = lengths_of(name)
    told = explain(*operands(seqlen_q, seqlen_kv), MASKS[name]())
    assert told[of_masks].adaptations == ("zero_padding",)
    assert told["torch/flex"].adaptations == ("zero_padding",)
    assert told["torch/flash"].adaptations == ("zero_padding", "materialize")
    bare = replace(told.problem, bias=told.problem.bias.without_padding())
    direct = explain_problem(bare)[of_masks]
    assert direct.adaptations == ()
    assert told[of_masks].seconds > direct.seconds


def test_pages_are_gathered_then_zeroed(of_masks):
    table, seqlens = torch.tensor([[2, 0], [1, 2], [0, 1]]), torch.tensor([5, 3, 0])
    mask = Paged(table, seqlens, 4, within=Causal("bottom-right"))
    query, _, _ = operands(2, 8)
    generator = torch.Generator().manual_seed(1)
    pages = [torch.randn(3, 4, 2, 8, generator=generator) for _ in range(2)]
    assert explain(query, *pages, mask, kernel=of_masks)[of_masks].adaptations == ("gather_pages", "zero_padding")
    want = reference_attention(query, *pages, mask)[0].float()
    torch.testing.assert_close(attention(query, *pages, mask, kernel=of_masks), want)


def test_each_call_has_its_own_lengths(of_masks):
    for seqlens in ([9, 4, 0], [1, 9, 2]):
        mask = Causal("top-left") & KeyPadding(seqlens)
        inputs = operands(6, 9, mask.bind(6, 9).valid_keys())
        want = reference_attention(*inputs, mask)[0].float()
        for name in (of_masks, "torch/tiled", "torch/flex"):
            torch.testing.assert_close(attention(*inputs, mask, kernel=name), want)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["key padding", "causal and key padding", "cached", "documents with gaps"])
def test_it_is_traced(of_masks, kind, dynamic):
    if kind == "documents with gaps" and dynamic:
        pytest.skip("documents have their own lengths")
    torch._dynamo.reset()
    make = {
        "key padding": KeyPadding,
        "causal and key padding": lambda n: Causal("bottom-right") & KeyPadding(n),
        "cached": lambda n: Cached(n, within=Causal("bottom-right")),
        "documents with gaps": lambda n: MASKS["documents with gaps"](),
    }[kind]
    compiled = torch.compile(
        lambda q, k, v, n: attention(q, k, v, make(n), kernel=of_masks),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    with record() as calls:
        for seqlens in ([9, 4, 6], [7, 9, 6]):
            seqlens = torch.tensor(seqlens)
            mask = make(seqlens)
            inputs = operands(6, 9, mask.bind(6, 9).valid_keys(), requires_grad=True)
            out = compiled(*inputs, seqlens)
            torch.testing.assert_close(out, reference_attention(*inputs, mask)[0].float())
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))
    assert {row.adaptations for row in calls} == {("zero_padding",)}


def test_documents_with_gaps_beside_another_mask_are_an_argument_of_the_tiled_op():
    torch._dynamo.reset()
    mask = MASKS["documents with gaps, windowed"]()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, mask, kernel="torch/tiled"), fullgraph=True, backend="aot_eager"
    )
    inputs = operands(9, 9, mask.bind(9, 9).valid_keys(), requires_grad=True)
    out = compiled(*inputs)
    torch.testing.assert_close(out, reference_attention(*inputs, mask)[0].float())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("name", MASKS)
def test_flex_on_the_cpu_refuses_in_a_graph_what_reads_a_tensor(name):
    seqlen_q, seqlen_kv = lengths_of(name)
    query, key, value = operands(seqlen_q, seqlen_kv)
    problem: Problem = replace(explain(query, key, value, MASKS[name]()).problem, compiling=True)
    told = explain_problem(problem)["torch/flex"]
    assert told.state == "refused"
    assert told.refused_fields == ("bias",)
