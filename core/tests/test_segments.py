"""Segments, by brute force: which keys a query sees is written here a second time, one document and pair at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import random
import re
import time

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    Intersection,
    KeyPadding,
    Segments,
    UnboundBiasError,
    Window,
    attention,
    explain,
    kernels,
    reference_attention,
)
from hypothesis import given, seed, settings
from hypothesis import strategies as st

SEED = 20261121
CORNERS = ("top-left", "bottom-right")
INNER = [None, *(Causal(corner) for corner in CORNERS)] + [
    Window(left, right, corner) for left, right in itertools.product((None, 0, 1, 3), repeat=2) for corner in CORNERS
]


def sees(within, i, j, seqlen_q, seqlen_kv):
    """Whether query i of a document sees its key j."""
    if within is None:
        return True
    centre = i + (seqlen_kv - seqlen_q if within.corner == "bottom-right" else 0)
    if isinstance(within, Causal):
        return j <= centre
    return (within.left is None or j >= centre - within.left) and (within.right is None or j <= centre + within.right)


def dense(mask, seqlen_q, seqlen_kv):
    """The dense form by loops over documents, queries and keys."""
    table = [[False] * seqlen_kv for _ in range(seqlen_q)]
    q0 = k0 = 0
    for n, (queries, keys) in enumerate(zip(mask.seqlens_q, mask.seqlens_kv)):
        k0 = k0 if mask.starts_kv is None else mask.starts_kv[n]
        for i, j in itertools.product(range(queries), range(keys)):
            table[q0 + i][k0 + j] = sees(mask.within, i, j, queries, keys)
        q0, k0 = q0 + queries, k0 + keys
    return table


def splits(total, count):
    return [sizes for sizes in itertools.product(range(total + 1), repeat=count) if sum(sizes) == total]


def packed(most=4, share=2):
    """Every way to pack up to three documents, empty ones too; of the masks within them, some of each."""
    rng = random.Random(SEED)
    for seqlen_q, seqlen_kv, count in itertools.product(range(most + 1), range(most + 1), (1, 2, 3)):
        for queries, keys in itertools.product(splits(seqlen_q, count), splits(seqlen_kv, count)):
            for within in rng.sample(INNER, share):
                yield Segments(queries, keys, within=within).bind(seqlen_q, seqlen_kv)


def with_gaps(most=4):
    rng = random.Random(SEED)
    for mask in packed(most - 1, 5):
        starts, end = [], 0
        for size in mask.seqlens_kv:
            starts.append(end + rng.randint(0, 2))
            end = starts[-1] + size
        gappy = Segments(mask.seqlens_q, mask.seqlens_kv, within=mask.within, starts_kv=starts)
        yield gappy.bind(mask.lengths[0], end + rng.randint(0, 2))


EVERY = {"packed": list(packed()), "with gaps": list(with_gaps())}
each_form = pytest.mark.parametrize("masks", EVERY.values(), ids=EVERY)


@each_form
def test_the_dense_form_equals_the_rule_written_as_a_loop(masks):
    assert len(masks) > 1000
    for mask in masks:
        assert mask.materialize().tolist() == dense(mask, *mask.lengths), mask


@each_form
def test_span_is_the_first_and_the_last_key_that_a_block_of_queries_sees(masks):
    for mask in masks:
        table = dense(mask, *mask.lengths)
        for q0, q1 in itertools.combinations(range(mask.lengths[0] + 1), 2):
            seen = [k for row in table[q0:q1] for k, pair in enumerate(row) if pair]
            assert mask.span(q0, q1) == ((min(seen), max(seen) + 1) if seen else (0, 0)), f"{mask}: rows {q0} to {q1}"


@each_form
def test_tiles_are_called_what_they_are(masks):
    kinds = set()
    for mask in masks:
        table = dense(mask, *mask.lengths)
        ranges = [list(itertools.combinations(range(length + 1), 2)) for length in mask.lengths]
        for (q0, q1), (k0, k1) in itertools.product(*ranges):
            pairs = [pair for row in table[q0:q1] for pair in row[k0:k1]]
            wanted = "full" if all(pairs) else "mixed" if any(pairs) else "empty"
            assert mask.tile(q0, q1, k0, k1) == wanted, f"{mask}: tile {q0, q1, k0, k1}"
            kinds.add(wanted)
    assert kinds == {"full", "mixed", "empty"}


@each_form
def test_pairs_are_counted_as_the_dense_form_has_them(masks):
    for mask in masks:
        assert mask.pairs() == sum(map(sum, dense(mask, *mask.lengths))), mask


@each_form
def test_a_key_is_valid_where_it_belongs_to_a_document(masks):
    for mask in masks:
        valid = mask.valid_keys()
        if mask.starts_kv is None:
            assert valid is None
            assert not mask.has_padding
            continue
        owned = {k for _, _, k0, k1 in mask.documents() for k in range(k0, k1)}
        assert mask.has_padding
        assert valid.tolist() == [[k in owned for k in range(mask.lengths[1])]], mask


@each_form
def test_each_document_by_itself_is_the_block_of_the_whole(masks):
    for mask in masks:
        whole = torch.zeros(mask.lengths, dtype=torch.bool)
        for n, (q0, q1, k0, k1) in enumerate(mask.documents()):
            within = mask.within_document(n)
            whole[q0:q1, k0:k1] = True if within is None else within.materialize()
        assert torch.equal(mask.materialize(), whole), mask


# Normalized


def check_normalized(mask):
    """What `mask` becomes, after a look at its dense form."""
    simple = mask.normalize()
    wanted = mask.materialize()
    if simple is None:
        assert wanted.all(), f"{mask} is not nothing"
        return simple
    assert torch.equal(simple.materialize().expand_as(wanted), wanted), f"{mask} -> {simple}"
    assert simple.has_padding <= mask.has_padding
    if simple.has_padding:
        assert torch.equal(simple.valid_keys(), mask.valid_keys()), f"{mask} -> {simple}"
    assert simple.normalize() == simple, "normalizing twice is normalizing once"
    return simple


@each_form
def test_normalize_never_changes_the_dense_form_nor_which_keys_exist(masks):
    kinds = {type(check_normalized(mask)) for mask in masks}
    assert {type(None), Segments, Causal, Window} == kinds


@st.composite
def documents(draw):
    count = draw(st.integers(1, 4))
    queries = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    equal = draw(st.booleans())
    keys = queries if equal else draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    starts, end = None, sum(keys)
    if draw(st.booleans()):
        gaps = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
        starts = [sum(keys[:n]) + sum(gaps[: n + 1]) for n in range(count)]
        end = starts[-1] + keys[-1] + draw(st.integers(0, 1))
    within = draw(st.sampled_from(INNER))
    return Segments(queries, keys, within=within, starts_kv=starts), (sum(queries), end)


@settings(max_examples=600, deadline=None, database=None)
@seed(SEED)
@given(documents(), st.lists(st.sampled_from([mask for mask in INNER if mask is not None]), min_size=1, max_size=2))
def test_what_is_joined_by_and_keeps_its_dense_form_when_normalized(segments, others):
    mask, lengths = segments
    again = Segments(mask.seqlens_q, mask.seqlens_kv, within=others[0], starts_kv=mask.starts_kv)
    check_normalized(Intersection((*others[1:], mask, others[0])).bind(*lengths))
    check_normalized((mask & again).bind(*lengths))


@pytest.mark.parametrize(
    ("mask", "lengths", "simple"),
    [
        (Segments([5]), (5, 5), None),
        (Segments([5], [7]), (5, 7), None),
        (Segments([], []), (0, 0), None),
        (Segments([0, 5, 0]), (5, 5), None),
        (Segments([5], within=Causal()), (5, 5), Causal("top-left")),
        (Segments([3], [5], within=Causal("bottom-right")), (3, 5), Causal("bottom-right")),
        (Segments([3], within=Window(1, 0)), (3, 3), Window(1, 0, "top-left")),
        (Segments([3, 2], within=Causal("bottom-right")), (5, 5), Segments([3, 2], within=Causal("top-left"))),
        (Segments([3, 2], within=Window(None, 0)), (5, 5), Segments([3, 2], within=Causal("top-left"))),
        (Segments([3, 2], within=Window(2, 1)), (5, 5), Segments([3, 2], within=Window(None, 1, "top-left"))),
        (Segments([3, 2], within=Window(2, 2)), (5, 5), Segments([3, 2])),
        (Segments([1, 1], [3, 5], within=Causal("bottom-right")), (2, 8), Segments([1, 1], [3, 5])),
        (Segments([3, 2], starts_kv=[0, 3]), (5, 5), Segments([3, 2])),
        (Segments([3, 0, 2], starts_kv=[0, 3, 4]), (5, 6), Segments([3, 2], starts_kv=[0, 4])),
        (Segments([3], starts_kv=[0]), (3, 4), Segments([3], starts_kv=[0])),
        (Segments([3, 2]) & Causal(), (5, 5), Segments([3, 2], within=Causal("top-left"))),
        (Causal("bottom-right") & Segments([3, 2]), (5, 5), Segments([3, 2], within=Causal("top-left"))),
        (Segments([3, 2]) & Window(1, 1), (5, 5), Segments([3, 2], within=Window(1, 1, "top-left"))),
        (
            Segments([3, 3]) & Window(1, None) & Causal(),
            (6, 6),
            Segments([3, 3], within=Window(1, 0, "top-left")),
        ),
        (Segments([3, 2], within=Causal()) & Window(1, 9), (5, 5), Segments([3, 2], within=Window(1, 0, "top-left"))),
        (Segments([4, 4]) & Window(4, 4), (8, 8), Segments([4, 4])),
        # The diagonal of the whole is, two keys later, that of each document's last query and key.
        (
            Segments([1, 2], [3, 2]) & Causal("bottom-right"),
            (3, 5),
            Segments([1, 2], [3, 2], within=Causal("bottom-right")),
        ),
        (
            Segments([3, 2], within=Window(1, None)) & Segments([3, 2], within=Causal()),
            (5, 5),
            Segments([3, 2], within=Window(1, 0, "top-left")),
        ),
        (Segments([3, 2]) & Segments([3, 2]), (5, 5), Segments([3, 2])),
    ],
    ids=repr,
)
def test_normalize_finds_the_simplest_kind(mask, lengths, simple):
    assert check_normalized(mask.bind(*lengths)) == (None if simple is None else simple.bind(*lengths))


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (Segments([3, 2], [2, 3]) & Causal("top-left"), (5, 5)),
        (Segments([3, 2]) & KeyPadding([4]), (5, 5)),
        (Segments([3, 2]) & Segments([2, 3]), (5, 5)),
    ],
    ids=["another diagonal", "padding", "other documents"],
)
def test_what_is_no_mask_within_each_document_stays_an_intersection(mask, lengths):
    assert isinstance(check_normalized(mask.bind(*lengths)), Intersection)


# Attention

TAKEN = [
    Segments([3, 0, 4]),
    Segments([3, 4], within=Causal()),
    Segments([3, 4], [4, 2], within=Causal("bottom-right")),  # two queries of the second document see nothing
    Segments([2, 5], within=Window(1, 2, "top-left")),
    Segments([3, 4], [2, 3], starts_kv=[1, 5]),
    Segments([3, 4], [2, 3], starts_kv=[1, 5], within=Window(1, 0, "bottom-right")),
    Segments([4, 3]) & KeyPadding([7, 6]),
]


def operands(mask, requires_grad=False):
    seqlen_kv = 9 if mask.has_padding and isinstance(mask, Segments) else 7 if not isinstance(mask, Segments) else None
    seqlen_kv = sum(mask.seqlens_kv) if seqlen_kv is None else seqlen_kv
    generator = torch.Generator().manual_seed(SEED)
    shapes = ((2, 7, 4, 8), (2, seqlen_kv, 2, 8), (2, seqlen_kv, 2, 8))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [kernel.name for kernel in kernels("torch/*")])
@pytest.mark.parametrize("mask", TAKEN, ids=repr)
def test_every_kernel_that_takes_it_is_right_and_reads_no_padding(mask, name, requires_grad):
    query, key, value = operands(mask, requires_grad)
    if explain(query, key, value, mask, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it: {explain(query, key, value, mask, kernel=name)}")
    bound = mask.bind(7, key.shape[1])
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)).double() * 8**-0.5
    logits = logits.masked_fill(~bound.materialize(), float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, value.repeat_interleave(2, 2).double()).float()
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, (query, key, value), upstream) if requires_grad else ()
    valid = bound.valid_keys()
    if valid is not None:
        with torch.no_grad():
            padding = ~valid.expand(2, -1)
            key[padding], value[padding] = float("nan"), float("inf")
    out = attention(query, key, value, mask, kernel=name)
    torch.testing.assert_close(out, want)
    if requires_grad:
        for ours, theirs in zip(torch.autograd.grad(out, (query, key, value), upstream), wanted):
            torch.testing.assert_close(ours, theirs.nan_to_num(0.0), rtol=1e-4, atol=1e-5)


def test_no_document_depends_on_another():
    query, key, value = (torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mask = Segments([4, 5], within=Causal())
    out = attention(query, key, value, mask)
    for rows in (slice(0, 4), slice(4, 9)):
        alone = attention(query[:, rows], key[:, rows], value[:, rows], Causal())
        torch.testing.assert_close(out[:, rows], alone)


def test_other_documents_of_the_same_lengths_are_not_taken_from_the_table():
    query, key, value = (torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for mask in (Segments([4, 5]), Segments([5, 4]), Segments([4, 5], within=Causal()), Segments([9])):
        want = reference_attention(query, key, value, mask)[0].float()
        torch.testing.assert_close(attention(query, key, value, mask), want)


# Traced


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BUILT = {
    "within": lambda q, k, v: attention(q, k, v, Segments([3, 0, 4], within=Causal())),
    "joined": lambda q, k, v: attention(q, k, v, Segments([3, 4]) & Causal()),
    "gaps": lambda q, k, v: attention(
        q, k, v, Segments([3, 4], [2, 3], starts_kv=[0, 3], within=Causal("bottom-right"))
    ),
    "offsets": lambda q, k, v: attention(q, k, v, Segments.from_offsets([0, 3, 7], [0, 4, 7])),
    "twice": lambda q, k, v: attention(attention(q, k, v, Segments([3, 4])), k, v, Segments([3, 4])),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_it_is_made_inside_a_graph(built, dynamic, fresh_dynamo):
    inputs = [torch.randn(1, 7, 2, 8) for _ in range(3)]
    traced = torch.compile(built, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(traced(*inputs), built(*inputs))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_it_is_passed_into_a_graph_which_knows_one_from_another(dynamic, fresh_dynamo):
    inputs = [torch.randn(1, 9, 2, 8) for _ in range(3)]
    traced = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")
    for mask in (
        Segments([4, 5]),
        Segments([5, 4], within=Causal()),
        Segments([5, 4], within=Window(1, 1)),
        Segments([5, 4], [3, 5], starts_kv=[0, 4]),
        Segments([5, 4]).bind(9, 9),
    ):
        torch.testing.assert_close(traced(*inputs, mask), attention(*inputs, mask))


def test_offsets_in_a_traced_tensor_are_refused_in_plain_words(fresh_dynamo):
    def of_offsets(query, offsets):
        return attention(query, query, query, Segments.from_offsets(offsets))

    with pytest.raises(Exception, match="cannot be read while a graph is traced"):
        torch.compile(of_offsets, fullgraph=True, backend="eager")(torch.randn(1, 7, 2, 8), torch.tensor([0, 3, 7]))


# Many documents


def test_thousands_of_documents_cost_no_more_than_one_to_look_up():
    sizes = [1 + n % 7 for n in range(4096)]
    few, many = Segments(sizes[:2]).bind(3, 3), Segments(sizes, within=Causal()).bind(sum(sizes), sum(sizes))
    hash(many.key)
    ratios = []
    for _ in range(15):
        seconds = []
        for mask in (few, many):
            start = time.perf_counter()
            for _ in range(200):
                hash(mask.key)
                assert mask.key == mask.key
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    assert sorted(ratios)[len(ratios) // 2] < 4, ratios  # hashed anew, it would be hundreds


def test_thousands_of_documents_are_asked_by_bisection():
    sizes = [1 + n % 7 for n in range(4096)]
    size = sum(sizes)
    mask = Segments(sizes, within=Causal()).bind(size, size)
    q0 = sum(sizes[:2000])
    assert mask.documents()[2000] == (q0, q0 + sizes[2000], q0, q0 + sizes[2000])
    assert mask.span(q0, q0 + sizes[2000]) == (q0, q0 + sizes[2000])
    assert mask.tile(q0, q0 + 1, q0, q0 + 1) == "full"
    assert mask.tile(q0, q0 + 1, 0, q0) == "empty"
    assert mask.pairs() == sum(n * (n + 1) / 2 for n in sizes)
    assert "<4096 documents: 1, 2, 3, " in repr(mask)


# Values


EXAMPLES = [
    Segments([2, 3]),
    Segments([2, 3], [3, 2]),
    Segments([2, 3], within=Causal()),
    Segments([2, 3], within=Window(1, None, "top-left")),
    Segments([2, 3], starts_kv=[0, 2]),
    Segments([2, 3], [1, 2], within=Causal("top-left"), starts_kv=[1, 4]),
    Segments([2, 3]).bind(5, 5),
]
each_example = pytest.mark.parametrize("mask", EXAMPLES, ids=repr)


@each_example
def test_repr_is_what_one_would_type(mask):
    again = eval(repr(mask))
    assert again == mask
    assert again.key == mask.key
    assert hash(again) == hash(mask)


@each_example
def test_it_is_equal_to_one_made_alike_and_to_no_other(mask):
    assert [other == mask for other in EXAMPLES].count(True) == 1
    assert [other.key == mask.key for other in EXAMPLES].count(True) == 1


@each_example
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "deepcopy", "pickle"]
)
def test_it_survives_copies(mask, copied):
    again = copied(mask)
    assert again == mask
    assert again.key == mask.key
    assert again.documents() == mask.documents()


@each_example
def test_it_is_made_again_of_its_facts(mask):
    bound = mask.bind(5, 9 if mask.has_padding else 5)
    assert Segments.from_facts(bound.facts(), 1, 1, bound.lengths) == bound


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Segments([2, 3]).packed = b""


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64], ids=str)
def test_offsets_say_where_documents_begin(dtype):
    offsets = [0, 5, 14, 14, 18]
    given = offsets if dtype is None else torch.tensor(offsets, dtype=dtype)
    assert Segments.from_offsets(given) == Segments([5, 9, 0, 4])
    assert Segments.from_offsets(given, [0, 1, 2, 3, 4], within=Causal("top-left")) == Segments(
        [5, 9, 0, 4], [1, 1, 1, 1], within=Causal("top-left")
    )


def test_the_docstring_draws_what_the_masks_are():
    masks = [
        Segments([2, 3]).bind(5, 5),
        Segments([2, 3], within=Causal()).bind(5, 5),
        Segments([2, 2], [2, 1], starts_kv=[0, 3]).bind(4, 4),
    ]
    rows = [re.split(r"\s{2,}", row.strip()) for row in Segments.__doc__.splitlines() if "█" in row]
    for column, mask in enumerate(masks):
        assert mask.draw().splitlines() == [row[column] for row in rows if column < len(row)], mask


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Segments([2, -1]), "seqlens_q must be >= 0, got -1 for document 1"),
        (lambda: Segments([2, 1], [2, -3]), "seqlens_kv must be >= 0, got -3 for document 1"),
        (lambda: Segments([2, 1], starts_kv=[-1, 4]), "starts_kv must be >= 0, got -1 for document 0"),
        (lambda: Segments([2, 3], [5]), "seqlens_q has 2 documents, seqlens_kv has 1"),
        (lambda: Segments([2, 3], starts_kv=[0, 2, 5]), "seqlens_q has 2 documents, starts_kv has 3"),
        (
            lambda: Segments([2, 3], starts_kv=[0, 1]),
            "must not overlap or go back, got keys 0 to 2 for document 0 and starts_kv=1 for document 1",
        ),
        (
            lambda: Segments([2, 3], starts_kv=[5, 1]),
            "must not overlap or go back, got keys 5 to 7 for document 0 and starts_kv=1 for document 1",
        ),
        (
            lambda: Segments([2, 3], [2, 4], within=Causal()),
            "in document 1, Causal() has no corner, and seqlen_q=3 differs from seqlen_kv=4",
        ),
        (
            lambda: Segments([1, 3], [2, 3], within=Window(1, 1)),
            "in document 0, Window() has no corner, and seqlen_q=1 differs from seqlen_kv=2",
        ),
        (lambda: Segments([2, 3], within=Causal().bind(2, 2)), "within must not be bound"),
        (lambda: Segments.from_offsets([0, 5, 3]), "offsets_q must not decrease, got offsets_q[1]=5, offsets_q[2]=3"),
        (
            lambda: Segments.from_offsets([0, 5], torch.tensor([0, -1])),
            "offsets_kv must not decrease, got offsets_kv[0]=0, offsets_kv[1]=-1",
        ),
        (lambda: Segments.from_offsets([1, 5]), "offsets_q[0] must be 0, where the first document begins, got [1]"),
        (lambda: Segments.from_offsets([]), "offsets_q[0] must be 0, where the first document begins, got []"),
        (lambda: Segments([2, 3]).bind(6, 5), "have seqlen_q=5 together, got seqlen_q=6"),
        (lambda: Segments([2, 3], [4, 4]).bind(5, 7), "have seqlen_kv=8 together, got seqlen_kv=7"),
        (lambda: Segments([2, 3], starts_kv=[0, 4]).bind(5, 6), "has keys up to 7, got seqlen_kv=6"),
        (lambda: Segments([2, 3]).bind(5, 5).bind(6, 6), "was made for seqlen_q=5, seqlen_kv=5"),
        (lambda: (Segments([2, 3]) & Segments([2, 4])).bind(5, 5), "have seqlen_q=6 together, got seqlen_q=5"),
    ],
)
def test_one_that_cannot_be_names_the_document_and_the_numbers(make, text):
    with pytest.raises(InputError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Segments([2, 3.0]), "seqlens_q must be ints, got 3.0 for document 1"),
        (lambda: Segments([True]), "seqlens_q must be ints, got True for document 0"),
        (lambda: Segments(5), "seqlens_q must be a sequence of ints, got int"),
        (lambda: Segments(torch.tensor([2, 3])), "got Tensor; Segments.from_offsets takes tensors of offsets"),
        (lambda: Segments([2, 3], within=KeyPadding([2])), "within takes Causal, Window or None, got KeyPadding"),
        (lambda: Segments.from_offsets(torch.tensor([0.0, 5.0])), "offsets_q must be integers"),
        (lambda: Segments.from_offsets(torch.tensor([[0, 5]])), "of shape [1, 2]"),
        (lambda: Segments.from_offsets(torch.tensor([0, 5], device="meta")), "got one on the meta device"),
    ],
)
def test_what_is_not_integers_is_refused(make, text):
    with pytest.raises(InputTypeError, match=re.escape(text)):
        make()


@pytest.mark.parametrize("question", ["materialize", "pairs", "normalize", "draw"])
def test_an_unbound_one_asked_for_its_lengths_names_bind(question):
    with pytest.raises(UnboundBiasError, match=r"bind\(seqlen_q, seqlen_kv\)"):
        getattr(Segments([2, 3]), question)()


# From the bottom right


@pytest.mark.parametrize(
    ("documents", "within", "same"),
    [
        (([3, 2],), Causal(), Causal("bottom-right")),
        (([3, 2],), Window(1, 1), Window(1, 1, "bottom-right")),
        (([3, 2], [5, 4]), Window(0, 2, "top-left"), Window(2, 0, "bottom-right")),
        (([3, 2], [5, 4]), Window(None, 2, "top-left"), Causal("bottom-right")),
        (([3, 4], [1, 2]), Causal("top-left"), Window(None, 2, "bottom-right")),
        (([3, 2], [5, 3]), Causal("bottom-right"), Causal("bottom-right")),
        (([3, 2], [5, 3]), None, None),
        (([3, 0, 2], [3, 7, 2]), Causal("top-left"), Causal("bottom-right")),
        (([3, 2], [5, 3]), Causal("top-left"), "none"),
        (([3, 2], [5, 4]), Causal("top-left"), "none"),
    ],
    ids=str,
)
def test_a_mask_within_documents_is_said_from_the_bottom_right_where_it_can_be(documents, within, same):
    lengths = sum(documents[0]), sum(documents[-1])
    bias = Segments(*documents, within=within).bind(*lengths)
    said = bias.from_bottom_right()
    if same == "none":
        assert said is None
        return
    assert said.within == same
    assert torch.equal(said.materialize(), bias.materialize())


@pytest.mark.parametrize("seed", range(40))
def test_what_is_said_from_the_bottom_right_keeps_what_was_kept(seed):
    rng = random.Random(seed)
    more = rng.randint(-3, 3)
    queries = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    keys = [max(n + more, 0) if rng.random() < 0.9 else rng.randint(0, 5) for n in queries]
    limits = [rng.choice((None, 0, 1, 2, 4)) for _ in range(2)]
    bias = Segments(queries, keys, within=Window(*limits, rng.choice(("top-left", "bottom-right"))))
    bias = bias.bind(sum(queries), sum(keys))
    said = bias.from_bottom_right()
    if said is None:
        corners = [Window(left, right, "bottom-right") for left in (None, *range(9)) for right in (None, *range(9))]
        assert not any(
            torch.equal(Segments(queries, keys, within=each).bind(*bias.lengths).materialize(), bias.materialize())
            for each in corners
        )
    else:
        assert said.within is None or said.within.corner == "bottom-right"
        assert torch.equal(said.materialize(), bias.materialize())
