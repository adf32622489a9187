"""Neighborhood, by brute force: what NATTEN defines is written here a second time, one query and one axis at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import random
import re

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    Neighborhood,
    UnboundBiasError,
    Window,
    attention,
    reference_attention,
)

SEED = 20261121


def keys_of(i, extent, kernel, stride, dilation, causal):
    """The keys that query i of one axis sees, by lists of points."""
    line = list(range(i % dilation, extent, dilation))
    p = line.index(i)
    group = [n for n in range(len(line)) if n // stride == p // stride]
    first = p // stride * stride
    if causal:
        leader = min(first + stride - 1, len(line) - 1)
        assert leader == group[-1]
        return [line[n] for n in range(leader - kernel + 1, leader + 1) if 0 <= n <= p]
    leader = min(first + stride // 2, len(line) - 1)
    window = [leader - kernel // 2 + t for t in range(kernel)]
    while window[0] < 0:
        window = [n + 1 for n in window]
    while window[-1] >= len(line):
        window = [n - 1 for n in window]
    return [line[n] for n in window]


def dense(mask):
    """The dense form by loops over the grid: one set of keys for each query, tokens in the order of the grid."""
    axes = list(zip(mask.extents, mask.kernel_size, mask.stride, mask.dilation, mask.is_causal))
    seen = [[set(keys_of(i, *axis)) for i in range(axis[0])] for axis in axes]
    grid = list(itertools.product(*(range(extent) for extent in mask.extents)))
    return [[all(k in seen[a][i] for a, (i, k) in enumerate(zip(q, key))) for key in grid] for q in grid]


def bound(mask):
    size = math.prod(mask.extents)
    return mask.bind(size, size)


def axes_of(extent):
    """Every (kernel_size, stride, dilation, is_causal) that is legal on an axis."""
    for kernel in range(1, extent + 1):
        for stride in range(1, kernel + 1):
            for dilation in range(1, extent // kernel + 1):
                for causal in (False, True):
                    yield kernel, stride, dilation, causal


def lines(extents=range(1, 11)):
    for extent in extents:
        for kernel, stride, dilation, causal in axes_of(extent):
            yield bound(Neighborhood(extent, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal))


def grids(rank, count, largest, seed=SEED):
    """Random ones, each axis drawn by itself from all that are legal there."""
    rng = random.Random(f"{seed} {rank}")
    for _ in range(count):
        extents = tuple(rng.randint(1, largest) for _ in range(rank))
        kernel, stride, dilation, causal = zip(*(rng.choice(list(axes_of(extent))) for extent in extents))
        yield bound(Neighborhood(extents, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal))


ALL_LINES = list(lines())
SOME = {
    "1-D": list(lines(range(1, 8))),
    "2-D": list(grids(2, 300, 6)),
    "3-D": list(grids(3, 300, 4)),
}
each_rank = pytest.mark.parametrize("masks", SOME.values(), ids=SOME)


def blocks(size, count, rng):
    """Every range of tokens where that is few, else random ones."""
    every = list(itertools.combinations(range(size + 1), 2))
    return every if len(every) <= count else rng.sample(every, count)


def test_the_dense_form_equals_the_rule_written_as_a_loop_on_every_small_line():
    assert len(ALL_LINES) > 500
    for mask in ALL_LINES:
        assert mask.materialize().tolist() == dense(mask), mask


@each_rank
def test_the_dense_form_equals_the_rule_written_as_a_loop(masks):
    for mask in masks:
        assert mask.materialize().tolist() == dense(mask), f"seed {SEED}: {mask}"


@each_rank
def test_every_query_sees_itself_and_without_is_causal_the_whole_window(masks):
    for mask in masks:
        rows = mask.materialize()
        assert rows.diagonal().all(), mask
        if not any(mask.is_causal):
            assert (rows.sum(-1) == math.prod(mask.kernel_size)).all(), mask


@pytest.mark.parametrize(
    ("extent", "options", "query", "keys"),
    [
        (7, {"kernel_size": 3}, 0, [0, 1, 2]),
        (7, {"kernel_size": 3}, 6, [4, 5, 6]),
        (8, {"kernel_size": 4}, 0, [0, 1, 2, 3]),
        (8, {"kernel_size": 4}, 3, [1, 2, 3, 4]),
        (8, {"kernel_size": 4}, 7, [4, 5, 6, 7]),
        (7, {"kernel_size": 3, "dilation": 2}, 3, [1, 3, 5]),
        (7, {"kernel_size": 3, "dilation": 2}, 6, [2, 4, 6]),
        (7, {"kernel_size": 3, "dilation": 2, "is_causal": True}, 2, [0, 2]),
        (10, {"kernel_size": 4, "stride": 2}, 5, [3, 4, 5, 6]),
        (12, {"kernel_size": 4, "stride": 4, "is_causal": True}, 5, [4, 5]),
    ],
    ids=str,
)
def test_windows_are_those_of_natten(extent, options, query, keys):
    mask = bound(Neighborhood(extent, **options))
    assert mask.materialize()[query].nonzero().flatten().tolist() == keys


def test_a_stride_of_the_kernel_size_is_attention_within_blocks_the_last_one_moved_inward():
    rows = bound(Neighborhood(7, kernel_size=3, stride=3)).materialize()
    wanted = [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3 + [[4, 5, 6]]
    assert [row.nonzero().flatten().tolist() for row in rows] == wanted


def test_tokens_are_numbered_with_the_last_axis_fastest():
    mask = bound(Neighborhood((3, 4), kernel_size=(1, 3)))
    assert mask.draw().splitlines()[5] == "····███·····"
    mask = bound(Neighborhood((3, 4), kernel_size=(3, 1)))
    assert mask.draw().splitlines()[5] == "·█···█···█··"


def test_the_docstring_draws_what_the_masks_are():
    columns = ({}, {"is_causal": True}, {"dilation": 2}, {"stride": 2})
    drawn = [re.split(r"\s{4,}", row.strip()) for row in Neighborhood.__doc__.splitlines() if "█" in row]
    assert len(drawn) == 7
    for column, options in enumerate(columns):
        mask = bound(Neighborhood(7, kernel_size=3, **options))
        assert mask.draw().splitlines() == [row[column] for row in drawn], options


# What is derived


@each_rank
def test_span_is_the_first_and_the_last_key_that_a_block_of_queries_sees(masks):
    rng = random.Random(SEED)
    for mask in masks:
        table = dense(mask)
        for q0, q1 in blocks(len(table), 8, rng):
            seen = [k for row in table[q0:q1] for k, pair in enumerate(row) if pair]
            assert mask.span(q0, q1) == (min(seen), max(seen) + 1), f"seed {SEED}: {mask}, rows {q0} to {q1}"


def test_span_of_no_queries_is_empty_and_what_lies_behind_the_lengths_is_left_out():
    mask = bound(Neighborhood((3, 4), kernel_size=(1, 3)))
    assert mask.span(5, 5) == (0, 0)
    assert mask.span(8, 100) == (8, 12)


@each_rank
def test_tiles_are_called_what_they_are(masks):
    rng = random.Random(SEED)
    for mask in masks:
        table = dense(mask)
        for (q0, q1), (k0, k1) in zip(*(rng.choices(blocks(len(table), 99, rng), k=8) for _ in "qk")):
            pairs = [pair for row in table[q0:q1] for pair in row[k0:k1]]
            wanted = "full" if all(pairs) else "mixed" if any(pairs) else "empty"
            assert mask.tile(q0, q1, k0, k1) == wanted, f"seed {SEED}: {mask}, tile {q0, q1, k0, k1}"


def test_the_random_tiles_are_of_every_kind():
    rng = random.Random(SEED)
    for masks in SOME.values():
        kinds = set()
        for mask in masks:
            size = mask.lengths[0]
            kinds |= {mask.tile(*q, *k) for q, k in zip(*(rng.choices(blocks(size, 99, rng), k=1) for _ in "qk"))}
        assert kinds == {"empty", "full", "mixed"}


@pytest.mark.parametrize("masks", [ALL_LINES, SOME["2-D"], SOME["3-D"]], ids=SOME)
def test_pairs_are_counted_as_the_dense_form_has_them(masks):
    for mask in masks:
        assert mask.pairs() == mask.materialize().sum().item(), mask


@pytest.mark.parametrize("masks", [ALL_LINES, SOME["2-D"], SOME["3-D"]], ids=SOME)
def test_normalize_never_changes_the_dense_form(masks):
    kinds = set()
    for mask in masks:
        simple = mask.normalize()
        kinds.add(type(simple))
        if simple is None:
            assert mask.materialize().all(), f"{mask} is not nothing"
        else:
            assert torch.equal(simple.materialize(), mask.materialize()), f"{mask} -> {simple}"
            assert simple.normalize() == simple, "normalizing twice is normalizing once"
    assert kinds == {type(None), Causal, Window, Neighborhood}


@pytest.mark.parametrize(
    ("mask", "simple"),
    [
        (Neighborhood(5, kernel_size=5), None),
        (Neighborhood((4, 5), kernel_size=(4, 5), stride=2), None),
        (Neighborhood((1, 1), kernel_size=1, is_causal=True), None),
        (Neighborhood(5, kernel_size=5, is_causal=True), Causal("top-left")),
        (Neighborhood(5, kernel_size=5, stride=3, is_causal=True), Causal("top-left")),
        (Neighborhood((1, 5), kernel_size=(1, 5), is_causal=True), Causal("top-left")),
        (Neighborhood(5, kernel_size=3, is_causal=True), Window(2, 0, "top-left")),
        (Neighborhood(5, kernel_size=1, dilation=2), Window(0, 0, "top-left")),
        (Neighborhood((5, 1), kernel_size=(3, 1)), Neighborhood(5, kernel_size=3)),
        (Neighborhood(6, kernel_size=3, dilation=2, stride=3), Neighborhood(6, kernel_size=3, dilation=2)),
        (Neighborhood(5, kernel_size=3), Neighborhood(5, kernel_size=3)),
        (Neighborhood((4, 5), kernel_size=(4, 3)), Neighborhood((4, 5), kernel_size=(4, 3))),
    ],
    ids=repr,
)
def test_normalize_finds_the_simplest_kind(mask, simple):
    mask = bound(mask)
    assert mask.normalize() == (simple if simple is None else simple.bind(*mask.lengths))


# Attention


def operands(seqlen, *, grad=False):
    torch.manual_seed(SEED)
    return [torch.randn(2, seqlen, 2, 16, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("kernel", [None, "torch/flash", "torch/math", "torch/flex", "torch/reference"], ids=str)
def test_attention_equals_attention_by_the_loops(kernel):
    mask = Neighborhood((5, 6), kernel_size=(3, 4), stride=(1, 2), is_causal=(True, False))
    query, key, value = operands(30)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    weights = logits.masked_fill(~torch.tensor(dense(mask)), -math.inf).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    torch.testing.assert_close(attention(query, key, value, mask, kernel=kernel), wanted)


@pytest.mark.parametrize(
    "mask",
    [
        Neighborhood((5, 6), kernel_size=3),
        Neighborhood((5, 6), kernel_size=(2, 3), dilation=2, stride=2, is_causal=(False, True)),
    ],
    ids=repr,
)
def test_forward_and_backward_equal_the_reference(mask):
    ours, theirs = operands(30, grad=True), [x.detach().double().requires_grad_() for x in operands(30)]
    out = attention(*ours, mask)
    right, _ = reference_attention(*theirs, mask)
    torch.testing.assert_close(out, right.float())
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    right.backward(upstream.double())
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad.float())


def test_a_window_of_the_whole_grid_is_plain_attention():
    query, key, value = operands(30)
    full = Neighborhood((5, 6), kernel_size=(5, 6))
    torch.testing.assert_close(attention(query, key, value, full), attention(query, key, value), rtol=0, atol=0)


def test_a_causal_window_of_the_whole_line_is_causal_attention():
    query, key, value = operands(30)
    full = Neighborhood(30, kernel_size=30, is_causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention(query, key, value, full), wanted)


# Traced


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_graph(query, key, value):
    return attention(query, key, value, Neighborhood((5, 6), kernel_size=(3, 2), is_causal=(False, True)))


def of_a_shape(query, key, value, image):
    return attention(query, key, value, Neighborhood(image.shape, kernel_size=3))


MASK = Neighborhood((5, 6), kernel_size=3, dilation=(1, 2))


@pytest.mark.parametrize(
    ("function", "more", "dynamic"),
    [
        (in_graph, (), None),
        (of_a_shape, (torch.zeros(5, 6),), True),
        (attention, (MASK,), None),
        (attention, (MASK.bind(30, 30),), True),
    ],
    ids=["built in the graph", "of a traced shape, dynamic", "passed in", "passed in bound, dynamic"],
)
def test_a_call_is_one_graph_and_equals_eager(function, more, dynamic, fresh_dynamo):
    inputs = operands(30)
    traced = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(traced(*inputs, *more), function(*inputs, *more))


def test_another_neighborhood_is_not_taken_for_the_one_that_was_traced(fresh_dynamo):
    inputs = operands(30)
    traced = torch.compile(attention, fullgraph=True, backend="eager")
    for mask in (
        Neighborhood((5, 6), kernel_size=3),
        Neighborhood((6, 5), kernel_size=3),
        Neighborhood((6, 5), kernel_size=3, is_causal=True),
        Neighborhood((6, 5), kernel_size=2),
        Neighborhood(30, kernel_size=4, stride=3),
    ):
        torch.testing.assert_close(traced(*inputs, mask), attention(*inputs, mask))


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Neighborhood((4, 5), kernel_size=(3, 6)), "kernel_size=6 * dilation=1 = 6 > 5 on axis 1"),
        (lambda: Neighborhood((7, 9), kernel_size=3, dilation=(3, 1)), "kernel_size=3 * dilation=3 = 9 > 7 on axis 0"),
        (lambda: Neighborhood((9, 9), kernel_size=3, stride=(2, 4)), "stride=4 is larger than kernel_size=3"),
        (lambda: Neighborhood((9, 9), kernel_size=3, stride=(2, 4)), "on axis 1"),
        (lambda: Neighborhood((9, 9), kernel_size=(3, 0)), "kernel_size must be an int >= 1, got 0 on axis 1"),
        (lambda: Neighborhood(9, kernel_size=True), "kernel_size must be an int >= 1, got True on axis 0"),
        (lambda: Neighborhood(9, kernel_size=3.0), "kernel_size must be an int >= 1, got 3.0 on axis 0"),
        (lambda: Neighborhood(9, kernel_size="3"), "kernel_size must be an int >= 1, got '3' on axis 0"),
        (lambda: Neighborhood(9, kernel_size=3, stride=0), "stride must be an int >= 1, got 0 on axis 0"),
        (
            lambda: Neighborhood((9, 9), kernel_size=3, dilation=(1, -1)),
            "dilation must be an int >= 1, got -1 on axis 1",
        ),
        (lambda: Neighborhood((9, 0), kernel_size=1), "extents must be an int >= 1, got 0 on axis 1"),
        (lambda: Neighborhood(True, kernel_size=1), "extents must be an int >= 1, got True on axis 0"),
        (lambda: Neighborhood((9, 9), kernel_size=3, is_causal=(True, 1)), "True or False, got 1 on axis 1"),
        (
            lambda: Neighborhood((9, 9), kernel_size=(3,)),
            "kernel_size must be one value, or one for each of the 2 axes",
        ),
        (lambda: Neighborhood((9, 9), kernel_size=(3,)), "got 1 values: (3,)"),
        (
            lambda: Neighborhood(9, kernel_size=3, is_causal=(True, False)),
            "is_causal must be one value, or one for each",
        ),
        (lambda: Neighborhood((), kernel_size=1), "extents must have 1 to 3 axes, got 0: ()"),
        (lambda: Neighborhood((2, 2, 2, 2), kernel_size=1), "extents must have 1 to 3 axes, got 4: (2, 2, 2, 2)"),
    ],
)
def test_one_that_cannot_be_names_the_axis_and_the_numbers(make, text):
    with pytest.raises(InputError, match=re.escape(text)):
        make()


@pytest.mark.parametrize("lengths", [(20, 21), (19, 20), (5, 4)], ids=str)
def test_lengths_that_are_not_the_grids_are_refused_with_all_numbers(lengths):
    mask = Neighborhood((4, 5), kernel_size=3)
    text = f"4 * 5 = 20 tokens, which must be both lengths, got seqlen_q={lengths[0]}, seqlen_kv={lengths[1]}"
    with pytest.raises(InputError, match=re.escape(text)):
        mask.bind(*lengths)
    with pytest.raises(InputError, match=re.escape(text)):
        mask.bind(20, 20).bind(*lengths)
    query, key = torch.randn(1, lengths[0], 2, 8), torch.randn(1, lengths[1], 2, 8)
    with pytest.raises(InputError, match=re.escape(text)):
        attention(query, key, key, mask)


@pytest.mark.parametrize("question", ["materialize", "pairs", "normalize", "draw"])
def test_an_unbound_one_asked_for_its_lengths_names_bind(question):
    with pytest.raises(UnboundBiasError, match=r"bind\(seqlen_q, seqlen_kv\)"):
        getattr(Neighborhood(7, kernel_size=3), question)()


# Values


def examples():
    return [
        Neighborhood(12, kernel_size=3),
        Neighborhood(12, kernel_size=3, stride=2),
        Neighborhood(12, kernel_size=3, dilation=2),
        Neighborhood(12, kernel_size=3, is_causal=True),
        Neighborhood(12, kernel_size=3).bind(12, 12),
        Neighborhood((4, 3), kernel_size=3),
        Neighborhood((4, 3), kernel_size=3, is_causal=(True, False)).bind(12, 12),
        Neighborhood((2, 2, 3), kernel_size=(1, 2, 3), stride=(1, 2, 1)),
    ]


TEXTS = [
    "Neighborhood(12, kernel_size=3)",
    "Neighborhood(12, kernel_size=3, stride=2)",
    "Neighborhood(12, kernel_size=3, dilation=2)",
    "Neighborhood(12, kernel_size=3, is_causal=True)",
    "Neighborhood(12, kernel_size=3).bind(12, 12)",
    "Neighborhood((4, 3), kernel_size=3)",
    "Neighborhood((4, 3), kernel_size=3, is_causal=(True, False)).bind(12, 12)",
    "Neighborhood((2, 2, 3), kernel_size=(1, 2, 3), stride=(1, 2, 1))",
]
each_example = pytest.mark.parametrize("index", range(len(TEXTS)), ids=TEXTS)


@each_example
def test_repr_is_what_one_would_type(index):
    assert repr(examples()[index]) == TEXTS[index]
    assert eval(TEXTS[index]) == examples()[index]


@each_example
def test_it_is_a_value_equal_to_one_made_alike(index):
    one, two = examples()[index], examples()[index]
    assert one == two
    assert hash(one) == hash(two)
    assert one.key == two.key
    for other in examples()[:index] + examples()[index + 1 :]:
        assert one != other
        assert one.key != other.key


@each_example
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "deepcopy", "pickle"]
)
def test_it_survives_copies(index, copied):
    mask = examples()[index]
    again = copied(mask)
    assert again == mask
    assert again.lengths == mask.lengths
    assert again.key == mask.key


@each_example
def test_it_is_made_again_of_its_facts(index):
    mask = bound(examples()[index])
    assert Neighborhood.from_facts(mask.facts(), 1, 1, mask.lengths) == mask


def test_one_value_is_that_of_every_axis_and_lists_will_do():
    wanted = Neighborhood((4, 6), kernel_size=(2, 2), stride=(2, 2), dilation=(2, 2), is_causal=(True, True))
    assert Neighborhood([4, 6], kernel_size=2, stride=2, dilation=[2, 2], is_causal=True) == wanted
    assert Neighborhood(torch.zeros(4, 6).shape, kernel_size=2, stride=2, dilation=2, is_causal=True) == wanted


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Neighborhood(7, kernel_size=3).kernel_size = (5,)
