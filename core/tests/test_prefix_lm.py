"""PrefixLM, by brute force: which keys a query sees is written here a second time, one pair at a time."""

from __future__ import annotations

import copy
import itertools
import pickle
import re

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    PrefixLM,
    attention,
    explain,
    kernels,
    reference_attention,
)

SIZES = list(itertools.product(range(6), range(6)))
EACH = [[0, 2], [3, 1], [5, 9]]  # a prefix for each of two batch entries


def masks(seqlen_q, seqlen_kv):
    """Every mask that is legal at these lengths, bound."""
    corners = ("top-left", "bottom-right", None) if seqlen_q == seqlen_kv else ("top-left", "bottom-right")
    for prefix, corner in itertools.product([*range(8), *EACH, torch.tensor([4, 0], dtype=torch.int32)], corners):
        yield PrefixLM(prefix, corner).bind(seqlen_q, seqlen_kv)


def dense(mask):
    """The dense form by loops: [batch][seqlen_q][seqlen_kv]."""
    seqlen_q, seqlen_kv = mask.lengths
    first = seqlen_kv - seqlen_q if mask.corner == "bottom-right" else 0
    prefixes = mask.prefix.tolist() if isinstance(mask.prefix, torch.Tensor) else [mask.prefix]
    return [[[k < prefix or k <= i + first for k in range(seqlen_kv)] for i in range(seqlen_q)] for prefix in prefixes]


def materialized(mask, lengths, batch):
    return mask.materialize().expand(batch, 1, *lengths)[:, 0].tolist()


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_the_dense_form_equals_the_rule_written_as_a_loop(lengths):
    for mask in masks(*lengths):
        assert materialized(mask, lengths, mask.batch_and_heads[0]) == dense(mask), mask


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_spans_and_tiles_are_sharp_for_all_batch_entries_together(lengths):
    for mask in masks(*lengths):
        table = dense(mask)
        for q0, q1 in itertools.combinations(range(lengths[0] + 1), 2):
            seen = [k for entry in table for row in entry[q0:q1] for k, pair in enumerate(row) if pair]
            assert mask.span(q0, q1) == (0, max(seen, default=-1) + 1), f"{mask}: rows {q0} to {q1}"
            for k0, k1 in itertools.combinations(range(lengths[1] + 1), 2):
                pairs = [pair for entry in table for row in entry[q0:q1] for pair in row[k0:k1]]
                wanted = "full" if all(pairs) else "mixed" if any(pairs) else "empty"
                assert mask.tile(q0, q1, k0, k1) == wanted, f"{mask}: tile {q0, q1, k0, k1}"


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_pairs_are_counted_and_estimated_from_above_where_each_entry_has_its_own_prefix(lengths):
    for mask in masks(*lengths):
        counts = [sum(map(sum, entry)) for entry in dense(mask)]
        if isinstance(mask.prefix, int):
            assert mask.pairs() == counts[0], mask
        else:
            assert mask.pairs() == lengths[0] * lengths[1] >= max(counts), mask


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_normalize_never_changes_the_dense_form(lengths):
    for mask in masks(*lengths):
        simple, batch = mask.normalize(), mask.batch_and_heads[0]
        if simple is None:
            assert all(pair for entry in dense(mask) for row in entry for pair in row), f"{mask} is not nothing"
        else:
            assert materialized(simple, lengths, batch) == dense(mask), f"{mask} -> {simple}"
            assert simple.normalize() == simple, "normalizing twice is normalizing once"


def test_normalize_finds_the_simplest_kind():
    assert PrefixLM(0, "bottom-right").bind(3, 5).normalize() == Causal("bottom-right").bind(3, 5)
    assert PrefixLM(3, "bottom-right").bind(3, 5).normalize() == Causal("bottom-right").bind(3, 5)
    assert PrefixLM(1).bind(5, 5).normalize() == Causal("top-left").bind(5, 5)
    assert PrefixLM(5).bind(5, 5).normalize() is None
    assert PrefixLM(9, "top-left").bind(2, 5).normalize() is None
    assert PrefixLM(2, "bottom-right").bind(1, 5).normalize() is None  # one query on the last key
    assert PrefixLM([2, 3], "bottom-right").bind(1, 5).normalize() is None
    assert PrefixLM(2).bind(5, 5).normalize() == PrefixLM(2, "top-left").bind(5, 5)
    kept = PrefixLM([2, 3], "bottom-right").bind(3, 5)
    assert kept.normalize() is kept


# Attention


def operands(seqlen_q=5, seqlen_kv=7, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, seqlen_q, 4, 8), (2, seqlen_kv, 2, 8), (2, seqlen_kv, 2, 8))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


TAKEN = [
    PrefixLM(4, "bottom-right"),
    PrefixLM(4, "top-left"),
    PrefixLM([5, 2], "top-left"),
    PrefixLM([5, 2], "bottom-right") & KeyPadding([7, 4]),
]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [kernel.name for kernel in kernels("torch/*")])
@pytest.mark.parametrize("mask", TAKEN, ids=repr)
def test_every_kernel_that_takes_it_is_right(mask, name, requires_grad):
    ours = operands(requires_grad=requires_grad)
    if explain(*ours, mask, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it: {explain(*ours, mask, kernel=name)}")
    theirs = [x.detach().double().requires_grad_() for x in ours]
    want = reference_attention(*theirs, mask)[0]
    out = attention(*ours, mask, kernel=name)
    torch.testing.assert_close(out, want.float())
    if requires_grad:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, ours, upstream), torch.autograd.grad(want, theirs, upstream.double())
        for mine, other in zip(*grads):
            torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-5)


def test_other_prefixes_of_the_same_shape_are_not_taken_from_the_table():
    inputs = operands()
    for prefix in ([1, 6], [6, 1], [3, 3], 3):
        mask = PrefixLM(prefix, "top-left")
        torch.testing.assert_close(attention(*inputs, mask), reference_attention(*inputs, mask)[0].float())


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kernel", [None, "torch/flex"], ids=str)
def test_it_is_traced_built_inside_or_passed_in(kernel, dynamic):
    torch._dynamo.reset()
    built = torch.compile(
        lambda q, k, v, p: attention(q, k, v, PrefixLM(p), kernel=kernel),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    passed = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")
    for seqlen, prefix in ((9, 3), (12, 5)):
        inputs = operands(seqlen, seqlen)
        for each in (prefix, torch.tensor([prefix, 0]))[: 2 if kernel is None else 1]:  # torch/flex refuses the tensor
            want = attention(*inputs, PrefixLM(each))
            torch.testing.assert_close(built(*inputs, each), want)
            torch.testing.assert_close(passed(*inputs, PrefixLM(each, "top-left"), kernel=kernel), want)


# Values

EXAMPLES = {
    "PrefixLM(3)": lambda: PrefixLM(3),
    "PrefixLM(4)": lambda: PrefixLM(4),
    'PrefixLM(3, "top-left")': lambda: PrefixLM(3, "top-left"),
    "PrefixLM([3])": lambda: PrefixLM([3]),
    'PrefixLM([3, 1], "bottom-right")': lambda: PrefixLM([3, 1], "bottom-right"),
    "PrefixLM([3, 2]).bind(5, 5)": lambda: PrefixLM([3, 2]).bind(5, 5),
}
each_example = pytest.mark.parametrize("text", EXAMPLES)


@each_example
def test_it_is_a_value(text):
    mask = EXAMPLES[text]()
    assert repr(mask) == text
    assert [make() == mask for make in EXAMPLES.values()].count(True) == 1
    for again in (EXAMPLES[text](), eval(text), copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask
        assert again.key == mask.key
        assert hash(again) == hash(mask)


def test_the_docstring_draws_what_the_mask_is():
    rows = [row.strip() for row in PrefixLM.__doc__.splitlines() if "█" in row]
    assert PrefixLM(2).bind(4, 4).draw().splitlines() == rows


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: PrefixLM(-1), InputError, "prefix counts keys, so it must be >= 0, got -1"),
        (lambda: PrefixLM([2, -3]), InputError, "got -3 for batch entry 1"),
        (lambda: PrefixLM([[2]]), InputTypeError, "prefix must be an integer tensor, or ints in sequences, got [[2]]"),
        (lambda: PrefixLM(torch.ones(2, 2).long()), InputError, "prefix must be [batch], got shape [2, 2]"),
        (lambda: PrefixLM(2.0), InputTypeError, "prefix must be an int, or an integer tensor or ints"),
        (lambda: PrefixLM(True), InputTypeError, "got True"),
        (lambda: PrefixLM(torch.ones(2)), InputTypeError, "prefix must be an integer tensor, got torch.float32"),
        (lambda: PrefixLM(2, "left"), InputError, 'corner must be "top-left" or "bottom-right", got \'left\''),
        (lambda: PrefixLM(2).bind(3, 4), InputError, "PrefixLM() has no corner, and seqlen_q=3 differs"),
        (lambda: PrefixLM(2).bind(4, 4).bind(5, 5), InputError, "was made for seqlen_q=4, seqlen_kv=4"),
        (lambda: attention(*operands(), PrefixLM([1, 2, 3], "top-left")), InputError, "made for batch=3, got batch=2"),
    ],
    ids=[
        "below-0",
        "one-below-0",
        "nested",
        "rank",
        "float",
        "bool",
        "float-tensor",
        "corner",
        "none",
        "bound",
        "batch",
    ],
)
def test_one_that_cannot_be_is_named_with_its_numbers(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()
