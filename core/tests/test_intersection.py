"""`a & b`: what both masks let a query attend; defined by its parts, right on every kernel."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    Intersection,
    KeyPadding,
    TensorBias,
    Window,
    attention,
    explain,
    kernels,
    record,
    reference_attention,
)

MASKS = {
    "causal": lambda: Causal("top-left"),
    "causal-bottom-right": lambda: Causal("bottom-right"),
    "window": lambda: Window(2, 1, "top-left"),
    "window-left": lambda: Window(1, None, "bottom-right"),
    "padding": lambda: KeyPadding([2, 5, 0]),
}
PAIRS = list(itertools.combinations_with_replacement(MASKS, 2))


def dense(mask, seqlen_q, seqlen_kv):
    return mask.bind(seqlen_q, seqlen_kv).materialize().expand(3, 1, seqlen_q, seqlen_kv)


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(5, 5), (3, 6), (6, 5), (1, 7)], ids=str)
def test_the_dense_form_is_what_both_keep(left, right, seqlen_q, seqlen_kv):
    both = MASKS[left]() & MASKS[right]()
    if "padding" in (left, right) and seqlen_kv < 5:
        pytest.skip("this padding is for five keys or more")
    want = dense(MASKS[left](), seqlen_q, seqlen_kv) & dense(MASKS[right](), seqlen_q, seqlen_kv)
    bound = both.bind(seqlen_q, seqlen_kv)
    assert torch.equal(dense(both, seqlen_q, seqlen_kv), want)
    simpler = bound.normalize()
    if simpler is None:
        assert want.all()
    else:
        assert torch.equal(simpler.materialize().expand_as(want), want)
    for q0, q1 in itertools.combinations(range(seqlen_q + 1), 2):
        low, high = bound.span(q0, q1)
        assert not want[..., q0:q1, :low].any()
        assert not want[..., q0:q1, high:].any()
        for k0, k1 in itertools.combinations(range(seqlen_kv + 1), 2):
            block = want[..., q0:q1, k0:k1]
            kind = bound.tile(q0, q1, k0, k1)
            assert kind != "empty" or not block.any()
            assert kind != "full" or block.all()


def test_and_flattens_and_what_says_nothing_is_dropped():
    three = Causal("top-left") & KeyPadding([3]) & Window(2, 2, "top-left")
    assert isinstance(three, Intersection)
    assert [type(mask) for mask in three.parts] == [Causal, KeyPadding, Window]
    assert (Causal("bottom-right") & Window(None, None, "top-left")).bind(4, 4).normalize() == Causal("top-left").bind(
        4, 4
    )
    assert (Causal("bottom-right") & Causal("top-left")).bind(4, 4).normalize() == Causal("top-left").bind(4, 4)
    assert (Causal("bottom-right") & Window(9, 9, "top-left")).bind(1, 4).normalize() is None
    two_lengths = (KeyPadding([1]) & KeyPadding([2])).bind(2, 2)
    assert two_lengths.normalize() is two_lengths  # the same key, other data


def test_it_is_a_value():
    mask = Causal("top-left") & KeyPadding([2, 5])
    assert mask == Causal("top-left") & KeyPadding([2, 5])
    assert mask != Causal("top-left") & KeyPadding([2, 4])
    assert mask != Causal("bottom-right") & KeyPadding([2, 5])
    assert hash(mask) == hash(Causal("top-left") & KeyPadding([2, 5]))
    assert pickle.loads(pickle.dumps(mask)) == mask == copy.deepcopy(mask)
    assert repr(mask) == 'Causal("top-left") & KeyPadding([2, 5])'
    assert (Causal("top-left") & Window(2, 2)).bind(5, 5).draw() == "█····\n██···\n███··\n·███·\n··███"


def operands(seqlen_q=5, seqlen_kv=7, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, seqlen_q, 4, 8), (3, seqlen_kv, 2, 8), (3, seqlen_kv, 2, 8))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [kernel.name for kernel in kernels("torch/*")])
def test_every_kernel_that_takes_causal_with_padding_is_right_and_reads_no_padding(name, requires_grad):
    mask = Causal("bottom-right") & KeyPadding([7, 3, 0])
    query, key, value = operands(requires_grad=requires_grad)
    want = reference_attention(query, key, value, mask)[0].float()
    if explain(query, key, value, mask, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it: {explain(query, key, value, mask, kernel=name)}")
    with torch.no_grad():
        for batch, length in enumerate([7, 3, 0]):
            key[batch, length:] = float("nan")
            value[batch, length:] = float("inf")
    out = attention(query, key, value, mask, kernel=name)
    torch.testing.assert_close(out, want)
    if requires_grad:
        grads = torch.autograd.grad(out.square().sum(), (query, key, value))
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[1][1, 3:].abs().sum() == 0


def test_other_lengths_of_the_same_shape_are_not_taken_from_the_table():
    query, key, value = operands()
    for lengths in ([7, 3, 1], [2, 7, 5], [1, 1, 1]):
        mask = Causal("bottom-right") & KeyPadding(lengths)
        want = reference_attention(query, key, value, mask)[0].float()
        torch.testing.assert_close(attention(query, key, value, mask), want)


def test_a_decoding_step_keeps_the_padding_alone():
    query, key, value = operands(seqlen_q=1)
    mask = Causal("bottom-right") & KeyPadding([7, 3, 2])
    with record() as calls:
        out = attention(query, key, value, mask)
        torch.testing.assert_close(out, attention(query, key, value, KeyPadding([7, 3, 2])))
    assert {type(row.problem.bias) for row in calls} == {KeyPadding}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_it_is_traced_built_inside_or_passed_in(dynamic):
    torch._dynamo.reset()
    built = torch.compile(
        lambda q, k, v, n: attention(q, k, v, Causal("bottom-right") & KeyPadding(n)),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    passed = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")
    for seqlen in (9, 12):
        inputs = operands(seqlen, seqlen)
        lengths = torch.tensor([seqlen, 3, 0])
        want = attention(*inputs, Causal() & KeyPadding(lengths))
        torch.testing.assert_close(built(*inputs, lengths), want)
        torch.testing.assert_close(passed(*inputs, Causal("top-left") & KeyPadding(lengths)), want)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Causal() & TensorBias(torch.ones(2, 2)), InputTypeError, "only masks intersect"),
        (lambda: Causal() & torch.ones(2, 2), InputTypeError, r"tensor of shape \[2, 2\]: only masks intersect; `\+`"),
        (lambda: torch.ones(2, 2) & Causal(), InputTypeError, r"tensor of shape \[2, 2\]: only masks intersect; `\+`"),
        (lambda: TensorBias(torch.ones(2, 2)) & Causal(), InputTypeError, "only masks intersect"),
        (lambda: Intersection((Causal(), "x")), InputTypeError, "takes masks, got str"),
        (lambda: Intersection((Causal(),)), InputError, "takes two or more, got 1"),
        (lambda: Causal().bind(3, 3) & Window(1, 1).bind(4, 4), InputError, "was made for other lengths than"),
        (lambda: KeyPadding([1]) & KeyPadding([1, 2]) & KeyPadding([1, 2, 3]), InputError, "batch=2 and 3"),
        (lambda: (Causal() & KeyPadding([1])).bind(3, 4), InputError, "Causal.* has no corner"),
        (lambda: (Causal() & KeyPadding([9])).bind(4, 4), InputError, r"must lie in \[0, seqlen_kv=4\]"),
    ],
    ids=[
        "tensor",
        "bare-tensor",
        "bare-tensor-first",
        "tensor-first",
        "no-mask",
        "one",
        "lengths",
        "batches",
        "corner",
        "padding",
    ],
)
def test_what_does_not_go_together_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
