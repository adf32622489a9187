"""xFormers' bias objects, taken as they are: each means what its own `materialize` says, compared with real xFormers.

It is not among the test requirements; `nox -s xformers` installs it, without its dependencies.
"""

from __future__ import annotations

import inspect
import itertools
import random
import re

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    Paged,
    Segments,
    Window,
    as_bias,
    attention,
    reference_attention,
)

theirs = pytest.importorskip(
    "xformers.ops.fmha.attn_bias", reason="xFormers is not installed; nox -s xformers has it", exc_type=ImportError
)

SEED = 20261121
SHAPES = list(itertools.product(range(1, 6), range(1, 6)))


def sizes(count, rng, low=0):
    return [rng.randint(low, 4) for _ in range(count)]


def unbound():
    """Those that know no lengths."""
    yield theirs.LowerTriangularMask()
    yield theirs.LowerTriangularFromBottomRightMask()
    for size in (1, 2, 3, 9):
        yield theirs.LowerTriangularFromBottomRightLocalAttentionMask(size)
    for left, right in itertools.product((0, 1, 2, 9), repeat=2):
        yield theirs.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)


def packed(rng):
    """Documents behind each other; some classes take no document with fewer keys than queries."""
    queries = sizes(3, rng)
    keys = [rng.randint(0, 4) for _ in queries]
    longer = [size + rng.randint(0, 2) for size in queries]
    size = rng.randint(1, 5)
    both = theirs.BlockDiagonalMask.from_seqlens(queries, keys)
    yield both
    yield both.make_causal()
    yield theirs.BlockDiagonalMask.from_seqlens(queries)
    above = theirs.BlockDiagonalMask.from_seqlens(queries, longer)
    yield above.make_causal_from_bottomright()
    yield above.make_local_attention(size)
    yield above.make_local_attention_from_bottomright(size)


def with_gaps(rng):
    """Keys with room for more, or anywhere."""
    queries, keys = sizes(3, rng), sizes(3, rng, low=1)
    padded = {"q_seqlen": queries, "kv_padding": max(keys) + rng.randint(0, 2), "kv_seqlen": keys}
    yield theirs.BlockDiagonalPaddedKeysMask.from_seqlens(**padded)
    yield theirs.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(**padded)
    yield theirs.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
        **padded, window_left=rng.randint(0, 3), window_right=rng.randint(0, 3)
    )
    yield theirs.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
        **padded, window_size=rng.randint(1, 4)
    )
    starts = [0]
    for size in keys:
        starts.append(starts[-1] + size + rng.randint(0, 2))
    yield theirs.BlockDiagonalGappyKeysMask.from_seqlens(queries, starts, keys)
    yield theirs.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(queries, starts, keys)


def documents(make, count=60):
    rng = random.Random(SEED)
    return [mask for _ in range(count) for mask in make(rng)]


def allowed(mask, shape):
    """What xFormers' own dense form lets through: it is 0 and -inf."""
    dense = mask.materialize(shape)
    assert ((dense == 0) | (dense == float("-inf"))).all()
    return dense == 0


def total(mask):
    return mask.q_seqinfo.seqstart_py[-1], mask.k_seqinfo.seqstart_py[-1]


def named(mask):
    """Its repr; of a class that has none of its own, which would tell an address, its name."""
    return type(mask).__name__ if " object at " in repr(mask) else repr(mask)


@pytest.mark.parametrize("mask", list(unbound()), ids=named)
def test_masks_without_lengths_are_the_same_on_every_shape(mask):
    for shape in SHAPES:
        assert torch.equal(as_bias(mask).bind(*shape).materialize(), allowed(mask, shape)), shape


@pytest.mark.parametrize("make", [packed, with_gaps], ids=["packed", "with gaps"])
def test_masks_of_documents_are_the_same_and_know_their_lengths(make):
    for mask in documents(make):
        ours = as_bias(mask)
        assert ours.lengths == total(mask), mask
        assert torch.equal(ours.materialize(), allowed(mask, total(mask))), f"seed {SEED}: {mask}"
        simple = ours.normalize()
        dense = torch.ones(total(mask), dtype=torch.bool) if simple is None else simple.materialize()
        assert torch.equal(dense, allowed(mask, total(mask))), f"seed {SEED}: {mask} -> {simple}"


@pytest.mark.parametrize("make", [packed, with_gaps], ids=["packed", "with gaps"])
def test_other_lengths_are_refused_with_the_numbers(make):
    for mask in documents(make, 3):
        seqlen_q, seqlen_kv = total(mask)
        for wrong in ((seqlen_q + 1, seqlen_kv), (seqlen_q, seqlen_kv + 1)):
            text = f"was made for seqlen_q={seqlen_q}, seqlen_kv={seqlen_kv}, got seqlen_q={wrong[0]}"
            with pytest.raises(InputError, match=re.escape(text)):
                as_bias(mask).bind(*wrong)


def test_a_causal_mask_with_a_tensor_adds_both():
    tensor = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(SEED))
    mask = theirs.LowerTriangularMaskWithTensorBias(tensor)
    assert torch.equal(as_bias(mask).bind(5, 4).materialize(), mask.materialize((2, 3, 5, 4)))
    with pytest.raises(InputError, match="does not broadcast"):
        as_bias(mask).bind(5, 5)


def test_every_class_of_xformers_is_taken_or_refused_by_name():
    compared = {type(mask).__name__ for mask in [*unbound(), *documents(packed, 1), *documents(with_gaps, 1)]}
    compared.add("LowerTriangularMaskWithTensorBias")
    for name, cls in inspect.getmembers(theirs, inspect.isclass):
        if not issubclass(cls, theirs.AttentionBias) or name in compared:
            continue
        with pytest.raises(InputTypeError, match=name):
            as_bias(object.__new__(cls))


def test_a_subclass_is_refused_since_it_may_mean_something_else():
    class Mine(theirs.LowerTriangularMask):
        pass

    with pytest.raises(InputTypeError, match="Mine is not one of xFormers' bias classes"):
        as_bias(Mine())


@pytest.mark.parametrize(
    ("mask", "ours"),
    [
        (lambda: theirs.LowerTriangularMask(), Causal("top-left")),
        (lambda: theirs.LowerTriangularFromBottomRightMask().make_local_attention(3), Window(2, 0, "bottom-right")),
        (lambda: theirs.LocalAttentionFromBottomRightMask(3, 1), Window(3, 1, "bottom-right")),
        (lambda: theirs.BlockDiagonalMask.from_seqlens([2, 3]), Segments([2, 3]).bind(5, 5)),
        (
            lambda: theirs.BlockDiagonalMask.from_seqlens([2, 3]).make_local_attention(2),
            Segments([2, 3], within=Window(1, 0, "top-left")).bind(5, 5),
        ),
        (
            lambda: theirs.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 2], 4, [3, 2]),
            Segments([1, 2], [3, 2], within=Causal("bottom-right"), starts_kv=[0, 4]).bind(3, 8),
        ),
    ],
    ids=["causal", "local-causal", "local", "documents", "local-documents", "padded"],
)
def test_they_become_the_kinds_that_say_the_same(mask, ours):
    assert as_bias(mask()) == ours


@pytest.mark.parametrize("make", [packed, with_gaps], ids=["packed", "with gaps"])
def test_a_call_takes_them_and_reads_no_padding(make):
    for mask in documents(make, 2):
        seqlen_q, seqlen_kv = total(mask)
        generator = torch.Generator().manual_seed(SEED)
        query, key, value = (torch.randn(1, n, 2, 8, generator=generator) for n in (seqlen_q, seqlen_kv, seqlen_kv))
        want = reference_attention(query, key, value, allowed(mask, (seqlen_q, seqlen_kv)))[0].float()
        valid = as_bias(mask).valid_keys()
        if valid is not None:
            key[~valid], value[~valid] = float("nan"), float("nan")
        torch.testing.assert_close(attention(query, key, value, mask), want)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("count", [1, 3], ids=["one query each", "three queries each"])
def test_pages_are_those_of_paged_where_every_sequence_has_as_many_queries(count, causal):
    torch.manual_seed(SEED)
    table, keys, page = torch.tensor([[4, 1, 3], [0, 4, 2]], dtype=torch.int32), [5, 7], 4
    cls = theirs.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask if causal else theirs.PagedBlockDiagonalPaddedKeysMask
    mask = cls.from_seqlens([count, count], keys, table, page)
    query, (key, value) = torch.randn(1, 2 * count, 2, 8), torch.randn(2, 1, 5 * page, 2, 8)
    written_out = mask.materialize((2 * count, 2 * 3 * page))
    want, _ = reference_attention(query, key, value, written_out)

    within = Causal("bottom-right") if causal else None
    bias = Paged(mask.block_tables, mask.k_seqinfo.seqlen, mask.page_size, within=within)
    pool = (x.view(-1, page, 2, 8) for x in (key, value))
    got = attention(query.view(2, count, 2, 8), *pool, bias)
    torch.testing.assert_close(got.view(1, 2 * count, 2, 8).double(), want)
