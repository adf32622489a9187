"""`BlockMask`: a boolean for each pair of blocks; and flex's BlockMask as a bias."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from attn_core import (
    BlockMask,
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    TensorBias,
    Window,
    as_bias,
    attention,
    explain,
    kernels,
    mask_mod,
    prefer,
    record,
    reference_attention,
)

SEED = 5
BATCH, HEADS = 2, 4


def random_blocks(*shape, share=0.6):
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return torch.rand(shape, generator=generator) < share


def by_loops(mask, seqlen_q, seqlen_kv):
    """`[BATCH, HEADS, seqlen_q, seqlen_kv]`, a pair at a time."""
    (block_q, block_kv), within = mask.block_size, mask.within

    def at(table, b, h, i, j):
        return bool(table.expand(BATCH, HEADS, *table.shape[-2:])[b, h, i, j])

    inner = None
    if within is not None:
        inner = within.bind(seqlen_q, seqlen_kv).materialize().expand(BATCH, HEADS, seqlen_q, seqlen_kv)
    kept = torch.zeros(BATCH, HEADS, seqlen_q, seqlen_kv, dtype=torch.bool)
    for b, h, q, k in itertools.product(*map(range, kept.shape)):
        block = b, h, q // block_q, k // block_kv
        seen = at(mask.blocks, *block)
        if seen and inner is not None and not (mask.full is not None and at(mask.full, *block)):
            seen = bool(inner[b, h, q, k])
        kept[b, h, q, k] = seen
    return kept


#: (mask, seqlen_q, seqlen_kv); the last blocks are cut off in most.
CASES = {
    "plain": (BlockMask(random_blocks(3, 4), 2), 6, 8),
    "ragged": (BlockMask(random_blocks(3, 3), (2, 3)), 5, 7),
    "batch": (BlockMask(random_blocks(BATCH, 1, 3, 2), (2, 4)), 6, 7),
    "heads": (BlockMask(random_blocks(HEADS, 3, 3), (2, 3)), 5, 7),
    "all-axes": (BlockMask(random_blocks(BATCH, HEADS, 2, 3), (4, 3)), 7, 8),
    "causal-within": (BlockMask(random_blocks(3, 3), (2, 3), within=Causal("bottom-right")), 5, 8),
    "window-within": (BlockMask(random_blocks(HEADS, 3, 4), 2, within=Window(1, 2, "top-left")), 6, 7),
    "full": (
        BlockMask(random_blocks(3, 4), 2, full=random_blocks(BATCH, 1, 3, 4), within=Causal("top-left")),
        6,
        7,
    ),
    "full-of-heads": (
        BlockMask(random_blocks(BATCH, 1, 2, 3), 3, full=random_blocks(HEADS, 2, 3), within=KeyPadding([2, 7])),
        5,
        7,
    ),
    "function-within": (
        BlockMask(random_blocks(3, 3), (2, 3), within=mask_mod(lambda b, h, q, k: (q + k) % (h + 2) > 0, num_heads=4)),
        6,
        7,
    ),
    "nothing": (BlockMask(torch.zeros(2, 3).bool(), 3), 5, 9),
    "all": (BlockMask(torch.ones(2, 3).bool(), 3), 5, 9),
    "all-within": (BlockMask(torch.ones(2, 3).bool(), 3, within=Causal("top-left")), 5, 9),
    "all-full": (BlockMask(torch.ones(2, 3).bool(), 3, full=torch.ones(2, 3).bool(), within=Causal("top-left")), 5, 9),
    "within-says-nothing": (BlockMask(random_blocks(2, 3), 3, within=Window(9, 9, "top-left")), 5, 9),
}
IDS = list(CASES)


@pytest.mark.parametrize("name", IDS)
def test_the_dense_form_is_its_own_loops_and_tiles_and_spans_cover_it(name):
    mask, *lengths = CASES[name]
    want = by_loops(mask, *lengths)
    bound = mask.bind(*lengths)
    assert torch.equal(bound.materialize().expand(want.shape), want)
    seqlen_q, seqlen_kv = lengths
    for q0, q1 in itertools.combinations(range(seqlen_q + 1), 2):
        low, high = bound.span(q0, q1)
        assert not want[..., q0:q1, :low].any()
        assert not want[..., q0:q1, high:].any()
        for k0, k1 in itertools.combinations(range(seqlen_kv + 1), 2):
            block = want[..., q0:q1, k0:k1]
            kind = bound.tile(q0, q1, k0, k1)
            assert kind != "empty" or not block.any()
            assert kind != "full" or block.all()


@pytest.mark.parametrize("within", [None, Window(1, 0, "top-left")], ids=["alone", "window within"])
@pytest.mark.parametrize(("shape", "lengths"), [((2, 0), (5, 0)), ((BATCH, HEADS, 0, 2), (0, 5))], ids=str)
def test_where_there_are_no_blocks_nothing_is_seen(shape, lengths, within):
    blocks = torch.ones(shape, dtype=torch.bool)
    mask = BlockMask(blocks, 3, full=None if within is None else blocks, within=within).bind(*lengths)
    assert mask.materialize().numel() == 0
    low, high = mask.span(0, lengths[0])
    assert 0 <= low <= high <= lengths[1]
    assert mask.tile(0, 5, 0, 5) in ("empty", "mixed")


@pytest.mark.parametrize("name", [name for name in IDS if CASES[name][0].within is None])
def test_without_a_mask_within_spans_and_tiles_are_exact(name):
    mask, *lengths = CASES[name]
    kept = by_loops(mask, *lengths)
    bound, (block_q, block_kv) = mask.bind(*lengths), mask.block_size
    for q0 in range(0, lengths[0], block_q):
        rows = kept[..., q0 : q0 + block_q, :].flatten(0, 2).any(0).nonzero().flatten().tolist()
        assert bound.span(q0, min(q0 + block_q, lengths[0])) == ((rows[0], rows[-1] + 1) if rows else (0, 0))
        for k0 in range(0, lengths[1], block_kv):
            block = kept[..., q0 : q0 + block_q, k0 : k0 + block_kv]
            kind = "full" if block.all() else "mixed" if block.any() else "empty"
            assert bound.tile(q0, min(q0 + block_q, lengths[0]), k0, min(k0 + block_kv, lengths[1])) == kind


@pytest.mark.parametrize("name", IDS)
def test_normalize_keeps_the_dense_form_and_finds_the_simplest(name):
    mask, *lengths = CASES[name]
    want = by_loops(mask, *lengths)
    simpler = mask.bind(*lengths).normalize()
    if simpler is None:
        assert want.all()
    else:
        assert torch.equal(simpler.materialize().expand(want.shape), want)
    kinds = {"all": type(None), "all-full": type(None), "all-within": Causal}
    assert type(simpler) is kinds.get(name, BlockMask)
    if name == "within-says-nothing":
        assert simpler.within is None


@pytest.mark.parametrize("name", [name for name in IDS if name != "function-within"])
def test_pairs_are_those_that_remain_or_more(name):
    mask, *lengths = CASES[name]
    even = BlockMask(mask.blocks, mask.block_size).bind(*lengths)
    at_whole_blocks = [size * count for size, count in zip(mask.block_size, mask.blocks.shape[-2:])]
    whole = by_loops(BlockMask(mask.blocks, mask.block_size), *at_whole_blocks)
    share = whole.double().mean()
    assert even.pairs() == pytest.approx(float(share) * lengths[0] * lengths[1])
    bound = mask.bind(*lengths)
    assert bound.without_data().pairs() == bound.pairs() <= lengths[0] * lengths[1]


def operands(seqlen_q, seqlen_kv, requires_grad=False):
    generator = torch.Generator().manual_seed(SEED)
    shapes = ((BATCH, seqlen_q, HEADS, 8), (BATCH, seqlen_kv, 2, 8), (BATCH, seqlen_kv, 2, 8))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kernel", [kernel.name for kernel in kernels("torch/*")])
@pytest.mark.parametrize("name", IDS)
def test_every_kernel_that_takes_it_is_right(name, kernel, requires_grad):
    mask, *lengths = CASES[name]
    inputs = operands(*lengths, requires_grad)
    if explain(*inputs, mask, kernel=kernel).chosen is None:
        pytest.skip(f"{kernel} does not take it here")
    want = reference_attention(*inputs, TensorBias(by_loops(mask, *lengths)))[0].float()
    out = attention(*inputs, mask, kernel=kernel)
    torch.testing.assert_close(out, want)
    if requires_grad:
        got = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), inputs))


@pytest.mark.parametrize("block_size", [128, (128, 256)], ids=str)
@pytest.mark.parametrize("within", [None, Causal("top-left")], ids=["blocks", "within"])
def test_flex_runs_blocks_of_its_own_sizes(block_size, within):
    rows, columns = (3, 3) if block_size == 128 else (3, 2)
    full = None if within is None else random_blocks(rows, columns)
    mask = BlockMask(random_blocks(HEADS, rows, columns), block_size, full=full, within=within)
    inputs = operands(300, 290 if columns == 2 else 300)
    want = reference_attention(*inputs, mask)[0].float()
    torch.testing.assert_close(attention(*inputs, mask, kernel="torch/flex"), want)


# A value


def test_it_is_a_value():
    blocks = random_blocks(3, 3)
    mask = BlockMask(blocks, 2, within=Causal("top-left"), full=random_blocks(BATCH, 1, 3, 3))
    same = BlockMask(blocks.clone(), (2, 2), within=Causal("top-left"), full=random_blocks(BATCH, 1, 3, 3))
    assert mask == same
    assert hash(mask) == hash(same)
    for other in (
        BlockMask(~blocks, 2, within=Causal("top-left"), full=mask.full),
        BlockMask(blocks, (2, 3), within=Causal("top-left"), full=mask.full),
        BlockMask(blocks, 2, within=Causal("bottom-right"), full=mask.full),
        BlockMask(blocks, 2, within=Causal("top-left")),
    ):
        assert mask != other
    first, second = (mask_mod(lambda b, h, q, k, width=width: q - k < width) for width in (1, 2))
    assert BlockMask(blocks, 2, within=first) != BlockMask(blocks, 2, within=second)
    bound = mask.bind(5, 6)
    assert pickle.loads(pickle.dumps(bound)) == bound == copy.deepcopy(bound)
    assert bound.to("meta").held()["blocks"].is_meta
    assert BlockMask(blocks, 2, within=KeyPadding([2, 4])).to("cpu").within == KeyPadding([2, 4])
    share = blocks.double().mean()
    assert repr(BlockMask(blocks, 2)) == f"BlockMask([3, 3], {share:.0%} True, 2)"
    assert repr(BlockMask(blocks, (2, 3), within=Causal())).endswith("True, (2, 3), within=Causal())")
    corner = BlockMask(torch.tensor([[1, 0], [1, 1]]).bool(), (2, 3), within=Causal("top-left"))
    assert corner.bind(4, 5).draw() == "█····\n██···\n███··\n████·"


def test_other_blocks_of_the_same_look_are_not_taken_from_the_table():
    inputs = operands(6, 6)
    ones = torch.ones(3, 3).bool()
    one_missing = ones.clone()
    one_missing[0, 1] = False
    for blocks in (ones, one_missing, ones, ~one_missing, one_missing.mT):
        mask = BlockMask(blocks, 2)
        want = reference_attention(*inputs, TensorBias(by_loops(mask, 6, 6)))[0].float()
        torch.testing.assert_close(attention(*inputs, mask), want)
        within = BlockMask(blocks, 2, within=Causal())
        want = reference_attention(*inputs, TensorBias(by_loops(within, 6, 6)))[0].float()
        torch.testing.assert_close(attention(*inputs, within), want)


@pytest.mark.parametrize("name", ["causal", "window", "padding", "function", "both"])
@pytest.mark.parametrize(("lengths", "block_size"), [((7, 9), (2, 3)), ((300, 260), 128)], ids=["small", "large"])
def test_from_mask_is_the_mask_with_blocks_that_are_empty_or_full(name, lengths, block_size):
    mask = {
        "causal": Causal("bottom-right"),
        "window": Window(3, 1, "top-left"),
        "padding": KeyPadding([5, 0]),
        "function": mask_mod(lambda b, h, q, k: (k // 3) % (h + 1) == 0, num_heads=HEADS),
        "both": Causal("top-left") & mask_mod(lambda b, h, q, k: (q - k) < 3 * (b + 1), batch=2),
    }[name]
    want = mask.bind(*lengths).materialize()
    made = BlockMask.from_mask(mask, *lengths, block_size)
    assert torch.equal(made.materialize(), want.expand(made.materialize().shape))
    block_q, block_kv = made.block_size
    want = want.expand(*made.blocks.shape[:2], *lengths)
    for i, j in itertools.product(*map(range, made.blocks.shape[-2:])):
        block = want[..., i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv].flatten(2)
        assert torch.equal(made.blocks[..., i, j], block.any(-1))
        assert torch.equal(made.full[..., i, j], block.all(-1))


# Traced


def built(query, key, value, blocks):
    return attention(query, key, value, BlockMask(blocks, (2, 3), within=Causal("top-left")))


@pytest.mark.parametrize(
    ("kernel", "dynamic"),
    [("torch/flash", None), ("torch/flash", True), ("torch/flex", None)],
    ids=["static", "dynamic", "flex"],
)
def test_it_is_traced_built_inside_or_passed_in(kernel, dynamic):
    torch._dynamo.reset()
    options = {"fullgraph": True, "dynamic": dynamic, "backend": "eager"}
    compiled, passed = torch.compile(built, **options), torch.compile(attention, **options)
    with prefer(kernel), torch.no_grad():
        for rows, columns in ((3, 3), (4, 5)):
            inputs = operands(2 * rows, 3 * columns - 1)
            blocks = random_blocks(BATCH, 1, rows, columns)
            want = built(*inputs, blocks)
            torch.testing.assert_close(compiled(*inputs, blocks), want)
            mask = BlockMask(blocks, (2, 3), within=Causal("top-left"))
            with record() as calls:
                torch.testing.assert_close(passed(*inputs, mask), want)
            assert {row.kernel for row in calls} <= {kernel}


def test_it_is_exported():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, blocks):
            return built(query, key, value, blocks)

    inputs = (*operands(6, 9), random_blocks(BATCH, 1, 3, 3))
    exported = torch.export.export(Model(), inputs).module()
    torch.testing.assert_close(exported(*inputs), built(*inputs))


# From flex


def flex_mask(function, batch=None, heads=None, seqlen_q=300, seqlen_kv=260, **options):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(function, batch, heads, seqlen_q, seqlen_kv, device="cpu", **options)


DOCUMENT = torch.arange(300) // torch.tensor([[40], [70]])


@pytest.mark.parametrize("separate", [True, False], ids=["full-apart", "partial-only"])
@pytest.mark.parametrize("block_size", [128, (64, 128), 32], ids=str)
def test_a_block_mask_of_flex_is_the_same_mask(block_size, separate):
    def rule(b, h, q_idx, kv_idx):
        return (DOCUMENT[b, q_idx] == DOCUMENT[b, kv_idx]) & (kv_idx <= q_idx + 8 * h)

    flex = flex_mask(rule, BATCH, HEADS, BLOCK_SIZE=block_size, separate_full_blocks=separate)
    b, h, q, k = (torch.arange(n) for n in (BATCH, HEADS, 300, 260))
    want = rule(b[:, None, None, None], h[:, None, None], q[:, None], k)
    bias = as_bias(flex)
    assert torch.equal(bias.materialize(), want)
    inputs = operands(300, 260)
    right = reference_attention(*inputs, TensorBias(want))[0].float()
    for kernel in ("torch/flash", "torch/flex"):
        torch.testing.assert_close(attention(*inputs, flex, kernel=kernel), right)


def test_blocks_that_flex_lists_without_a_mask_mod_are_seen_whole():
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    counts = torch.tensor([[[2, 1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[2, 0, 1], [1, 2, 0], [0, 1, 2]]]], dtype=torch.int32)
    flex = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(2, 3), seq_lengths=(5, 8))
    bias = as_bias(flex)
    assert bias.within is None
    assert bias.blocks.tolist() == [[[[True, False, True], [False, True, False], [False, False, False]]]]
    assert bias.lengths == (5, 8)


def test_a_block_mask_of_flex_is_passed_into_a_graph():
    torch._dynamo.reset()
    flex = flex_mask(lambda b, h, q, k: q >= k, seqlen_q=260)
    inputs = operands(260, 260)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, flex), attention(*inputs, Causal()))


def test_flex_is_not_imported_to_know_its_block_mask():
    code = (
        "import sys, torch, attn_core\n"
        "q = torch.ones(1, 4, 1, 8)\n"
        "mask = attn_core.BlockMask(torch.eye(2).bool(), 2, within=attn_core.mask_mod(lambda b, h, q, k: q >= k))\n"
        "attn_core.attention(q, q, q, mask, kernel='torch/flash')\n"
        "assert attn_core.as_bias(mask) is mask\n"
        "print([name for name in sys.modules if name in ('torch.nn.attention.flex_attention', 'torch._dynamo')])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def slice_of_flex():
    return as_bias(flex_mask(lambda b, h, q, k: q >= k + b, BATCH)[1:])


def with_too_few_rows():
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    return as_bias(FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=2, seq_lengths=(5, 6)))


def ones(*shape):
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: BlockMask(torch.ones(2, 2), 2),
            InputTypeError,
            r"blocks must be a boolean tensor, got torch\.float32",
        ),
        (lambda: BlockMask([[True]], 2), InputTypeError, "blocks must be a boolean tensor, got list"),
        (lambda: BlockMask(ones(3), 2), InputError, r"blocks must be \[batch, .* got shape \[3\]"),
        (lambda: BlockMask(ones(1, 1, 1, 2, 2), 2), InputError, r"got shape \[1, 1, 1, 2, 2\]"),
        (lambda: BlockMask(ones(2, 2), 0), InputError, "block_size must be an int >= 1.* got 0"),
        (lambda: BlockMask(ones(2, 2), (2, 2, 2)), InputError, r"got \(2, 2, 2\)"),
        (lambda: BlockMask(ones(2, 2), 2.5), InputError, r"got 2\.5"),
        (lambda: BlockMask(ones(2, 2), 2, full=ones(2, 2)), InputError, "full says where `within` need not be asked"),
        (
            lambda: BlockMask(ones(2, 2), 2, full=ones(2, 3), within=Causal()),
            InputError,
            "full must have the 2 x 2 blocks of `blocks`, .* got 2 x 3",
        ),
        (
            lambda: BlockMask(ones(2, 2), 2, full=ones(2, 2).int(), within=Causal()),
            InputTypeError,
            r"full must be a boolean tensor, got torch\.int32",
        ),
        (
            lambda: BlockMask(ones(2, 2), 2, within=TensorBias(ones(4, 4))),
            InputTypeError,
            "within takes a mask, got Ten",
        ),
        (lambda: BlockMask(ones(2, 1, 2, 2), 2, within=KeyPadding([1, 2, 3])), InputError, "made for batch=2 and 3"),
        (
            lambda: BlockMask(ones(3, 2, 2), 2, full=ones(4, 2, 2), within=Causal()),
            InputError,
            "made for num_heads=3 and 4",
        ),
        (
            lambda: BlockMask(ones(2, 3), (4, 2)).bind(9, 6),
            InputError,
            "has 2 blocks of 4 on seqlen_q, for 5 to 8, got seqlen_q=9",
        ),
        (
            lambda: BlockMask(ones(2, 3), (4, 2)).bind(8, 4),
            InputError,
            "has 3 blocks of 2 on seqlen_kv, for 5 to 6, got seqlen_kv=4",
        ),
        (lambda: BlockMask(ones(2, 3), 4, within=Causal()).bind(8, 9), InputError, r"Causal\(\) has no corner"),
        (lambda: BlockMask(ones(2, 2), 2).bind(3, 3).bind(4, 4), InputError, "made for seqlen_q=3, seqlen_kv=3"),
        (
            lambda: attention(*operands(4, 4), BlockMask(ones(3, 1, 2, 2), 2)),
            InputError,
            "made for batch=3, got batch=2",
        ),
        (lambda: attention(*operands(4, 4), BlockMask(ones(3, 2, 2), 2)), InputError, "made for num_heads=3, got"),
        (
            lambda: attention(*operands(256, 260), flex_mask(lambda b, h, q, k: q >= k)),
            InputError,
            "made for seqlen_q=300, seqlen_kv=260, got seqlen_q=256, seqlen_kv=260",
        ),
        (
            lambda: attention(*operands(300, 260), flex_mask(lambda b, h, q, k: q >= k + b)),
            InputError,
            r"varies by batch entry \(b\)",
        ),
        (slice_of_flex, InputError, "a slice of a flex BlockMask has no mask_mod"),
        (with_too_few_rows, InputError, r"has 2 rows of 2 queries, and its seq_lengths \(5, 6\) need 3"),
        (lambda: BlockMask.from_mask(Causal(), 4, 5), InputError, "has no corner"),
        (lambda: BlockMask.from_mask(Causal(), 4, 4, 0), InputError, "block_size must be an int >= 1"),
        (lambda: BlockMask.from_mask(TensorBias(ones(4, 4)), 4, 4), InputTypeError, "from_mask: takes a mask, got Ten"),
        (lambda: BlockMask(ones(2, 2), None), InputError, "block_size must be an int >= 1.* got None"),
        (lambda: BlockMask(ones(2, 2), (2, "2")), InputError, r"block_size must be .* got \(2, '2'\)"),
    ],
    ids=[
        "floating",
        "list",
        "rank-1",
        "rank-5",
        "block-0",
        "three-sizes",
        "block-float",
        "full-alone",
        "full-shape",
        "full-dtype",
        "within-a-tensor",
        "batches",
        "heads",
        "too-many-queries",
        "too-few-keys",
        "corner",
        "rebind",
        "other-batch",
        "other-heads",
        "flex-lengths",
        "flex-batch",
        "flex-slice",
        "flex-rows",
        "from-mask-corner",
        "from-mask-block",
        "from-a-tensor",
        "block-none",
        "block-string",
    ],
)
def test_what_does_not_fit_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
