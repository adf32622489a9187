"""The algebra of biases: bands on one diagonal are one band, and what is made of bound parts is bound."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attn_core import (
    ALiBi,
    BlockMask,
    Capabilities,
    Causal,
    InputError,
    Intersection,
    Kernel,
    KeyPadding,
    Segments,
    Sum,
    TensorBias,
    Window,
    attention,
    explain,
    plan,
    record,
    reference_attention,
    register,
    scaled_dot_product_attention,
)

LIMITS = (None, 0, 1, 3)
CORNERS = ("top-left", "bottom-right")
BANDS = [Causal(corner) for corner in CORNERS]
BANDS += [Window(left, right, corner) for left in LIMITS for right in LIMITS for corner in CORNERS]


def is_one_band(dense, seqlen_q, seqlen_kv):
    """Whether a dense mask is what a Causal or a Window of some limits leaves, found by trying all."""
    limits = (None, *range(max(seqlen_q, seqlen_kv)))
    return any(
        torch.equal(Window(left, right, corner).bind(seqlen_q, seqlen_kv).materialize(), dense)
        for left in limits
        for right in limits
        for corner in CORNERS
    )


def test_causal_and_a_window_to_the_left_are_that_window():
    assert (Causal() & Window(3, 0)).bind(9, 9).normalize() == Window(3, 0, "top-left").bind(9, 9)
    assert (Window(3, 2) & Causal()).bind(9, 9).normalize() == Window(3, 0, "top-left").bind(9, 9)
    assert (Window(9, 2) & Window(None, 0)).bind(9, 9).normalize() == Causal("top-left").bind(9, 9)
    both = Window(5, 2, "bottom-right") & Window(3, 4, "bottom-right")
    assert both.bind(7, 9).normalize() == Window(3, 2, "bottom-right").bind(7, 9)


def test_a_band_keeps_the_corner_in_which_it_was_written():
    both = Causal("bottom-right") & Window(3, 0, "bottom-right")
    assert both.bind(4, 6).normalize() == Window(3, 0, "bottom-right").bind(4, 6)


@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 5])
@pytest.mark.parametrize("seqlen_kv", [1, 3, 4, 6])
def test_two_bands_are_one_where_one_can_say_it_and_never_other_than_both(seqlen_q, seqlen_kv):
    for one, other in itertools.combinations(BANDS, 2):
        both = (one & other).bind(seqlen_q, seqlen_kv)
        want = both.materialize()
        simple = both.normalize()
        got = torch.ones_like(want) if simple is None else simple.materialize()
        assert torch.equal(got, want), f"{both} -> {simple}"
        if isinstance(simple, Intersection):
            assert not is_one_band(want, seqlen_q, seqlen_kv), f"{both} stays"


def test_any_number_of_bands_beside_other_masks_is_at_most_two():
    draw = random.Random(20261121)
    for _ in range(300):
        seqlen_q, seqlen_kv = draw.randint(0, 7), draw.randint(0, 7)
        bands = draw.choices(BANDS, k=draw.randint(2, 5))
        padding = KeyPadding([draw.randint(0, seqlen_kv) for _ in range(2)])
        parts = [*bands, padding] if draw.random() < 0.5 else list(bands)
        draw.shuffle(parts)
        both = Intersection(tuple(parts)).bind(seqlen_q, seqlen_kv)
        want = both.materialize()
        simple = both.normalize()
        got = torch.ones_like(want) if simple is None else simple.materialize()
        assert torch.equal(got.expand_as(want), want), f"{both} -> {simple}"
        left = simple.parts if isinstance(simple, Intersection) else (simple,)
        assert sum(isinstance(part, (Causal, Window)) for part in left) <= 2, f"{both} -> {simple}"


def test_bands_beside_documents_are_said_within_them():
    both = (Segments([4, 5]) & Causal() & Window(2, 0)).bind(9, 9)
    assert both.normalize() == Segments([4, 5], within=Window(2, 0, "top-left")).bind(9, 9)


def operands(seqlen_q, seqlen_kv=None):
    generator = torch.Generator().manual_seed(0)
    lengths = (seqlen_q, seqlen_kv or seqlen_q, seqlen_kv or seqlen_q)
    return [torch.randn(2, n, 2, 8, generator=generator) for n in lengths]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bands_become_one_while_a_graph_is_traced(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, Causal("bottom-right") & Window(3, 1, "bottom-right")),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    with record() as calls:
        for lengths in ((9, 12), (12, 14)):
            inputs = operands(*lengths)
            want = reference_attention(*inputs, Window(3, 0, "bottom-right"))[0].float()
            torch.testing.assert_close(compiled(*inputs), want)
    assert [row.compiled for row in calls] == [True] * len(calls) != []
    assert all(row.reason.endswith(", Window") for row in calls), [row.reason for row in calls]


def test_bands_of_two_corners_stay_apart_in_a_graph_that_serves_all_lengths():
    torch._dynamo.reset()
    mask = Causal("top-left") & Window(2, 1, "bottom-right")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask), fullgraph=True, dynamic=True, backend="eager")
    for lengths in ((9, 12), (12, 14), (8, 5)):
        inputs = operands(*lengths)
        torch.testing.assert_close(compiled(*inputs), reference_attention(*inputs, mask)[0].float())


# What is made of bound parts is bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: Causal().bind(6, 6) & KeyPadding([2, 6]).bind(6, 6),
        lambda: Causal().bind(6, 6) & KeyPadding([2, 6]),
        lambda: Causal() & KeyPadding([2, 6]).bind(6, 6),
        lambda: (Causal() & KeyPadding([2, 6])).bind(6, 6),
        lambda: Causal() & (Window(3, 3) & KeyPadding([2, 6])).bind(6, 6),
        lambda: ALiBi(2).bind(6, 6) + Causal(),
        lambda: ALiBi(2) + Causal().bind(6, 6),
        lambda: ALiBi(2) + torch.zeros(6, 6) + Causal().bind(6, 6),
        lambda: (ALiBi(2) + Causal()).bind(6, 6) + KeyPadding([2, 6]),
        lambda: Causal().bind(6, 6) + KeyPadding([2, 6]),
        lambda: TensorBias(torch.zeros(6, 6)).bind(6, 6) + ALiBi(2),
    ],
)
def test_parts_of_which_one_is_bound_make_a_bound_bias(make):
    bias = make()
    assert bias.lengths == (6, 6)
    assert all(part.lengths == (6, 6) for part in bias.parts)
    assert bias.materialize().shape[-2:] == (6, 6)
    assert bias.draw().count("\n") >= 5
    assert bias == bias.bind(6, 6)
    inputs = operands(6)
    torch.testing.assert_close(attention(*inputs, bias), reference_attention(*inputs, bias)[0].float())


def test_parts_that_are_not_bound_make_a_bias_that_is_not():
    assert (Causal() & KeyPadding([2, 6])).lengths is None
    assert (Causal() + ALiBi(2)).lengths is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Causal("top-left").bind(6, 7) & Window(3, 3), r"Window\(\) has no corner, and seqlen_q=6"),
        (lambda: ALiBi(2) + Causal("top-left").bind(6, 7), r"ALiBi\(\) has no corner, and seqlen_q=6"),
        (lambda: Causal().bind(6, 6) & KeyPadding([7]), r"must lie in \[0, seqlen_kv=6\]"),
        (lambda: TensorBias(torch.zeros(5, 6)) + Causal().bind(6, 6), "seqlen_q is 5"),
        (lambda: Causal().bind(6, 6) & Causal().bind(5, 5), "was made for other lengths than"),
        (lambda: ALiBi(2).bind(6, 6) + Causal().bind(5, 5), "was made for other lengths than"),
    ],
)
def test_a_part_that_does_not_fit_the_lengths_of_another_is_named(make, text):
    with pytest.raises(InputError, match=text):
        make()


@pytest.mark.parametrize("bias", [Causal(), Window(1, 1), ALiBi(2)], ids=repr)
def test_the_error_of_a_missing_corner_says_what_can_be_written_for_every_kind(bias):
    with pytest.raises(InputError, match="has no corner") as error:
        bias.bind(3, 5)
    assert f"{type(bias).__name__}(corner=" not in str(error.value)
    assert 'corner="top-left"' in str(error.value)
    assert 'corner="bottom-right"' in str(error.value)


def test_a_sum_keeps_its_kind_and_order():
    bias = ALiBi(2) + Causal().bind(4, 4)
    assert type(bias) is Sum
    assert [type(part) for part in bias.parts] == [ALiBi, Causal]


# What is simplified reaches the kernel


SIMPLIFIED = {
    "a decoding step": lambda table: TensorBias(table) + Causal("bottom-right"),
    "a wide window": lambda table: Window(None, None, "top-left") + TensorBias(table),
    "blocks of which all are seen": lambda table: TensorBias(table) + BlockMask(torch.ones(1, 2).bool(), (1, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["torch/flash", "torch/math", "torch/tiled", "torch/flex", "torch/reference"])
@pytest.mark.parametrize("case", SIMPLIFIED)
def test_a_tensor_beside_a_mask_that_masks_nothing_is_that_tensor_on_every_kernel(case, name, dtype):
    query, key, value = operands(1, 7)
    if explain(query, key, value, SIMPLIFIED[case](torch.zeros(1, 7).to(dtype)), kernel=name).chosen is None:
        pytest.skip(f"{name} takes no such bias")
    generator = torch.Generator().manual_seed(1)
    planned = None
    for _ in range(2):  # the second finds the choice of the first, and brings its own numbers
        table = torch.randn(1, 7, generator=generator)
        table = table > 0 if dtype is torch.bool else table
        bias = SIMPLIFIED[case](table)
        want = reference_attention(query, key, value, TensorBias(table))[0].float()
        planned = planned or plan(query, key, value, bias, kernel=name)
        torch.testing.assert_close(attention(query, key, value, bias, kernel=name), want)
        torch.testing.assert_close(planned(query, key, value, bias), want)


def test_a_tensor_beside_is_causal_and_one_key_is_that_tensor():
    query, key, value = (x.transpose(1, 2) for x in operands(5, 1))
    bias = TensorBias(torch.randn(5, 1, generator=torch.Generator().manual_seed(2)))
    out = scaled_dot_product_attention(query, key, value, bias, is_causal=True)
    torch.testing.assert_close(out, value.expand(-1, -1, 5, -1))


def test_a_function_that_a_kernel_prepares_is_given_the_bias_of_its_problem():
    """Each call's own, in the simplest form."""
    given = []

    def run(query, key, value, *, bias=None, scale):
        raise AssertionError("it is prepared")

    def prepare(problem):
        assert type(problem.bias) is KeyPadding

        def prepared(query, key, value, bias):
            given.append(bias)
            return query

        return prepared

    able = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, biases={KeyPadding})
    with register(Kernel(name="toy/prepared", run=run, prepare=prepare, capabilities=able)):
        for seqlens in ([3, 4], [4, 2]):
            attention(*operands(1, 4), Causal("bottom-right") & KeyPadding(seqlens), kernel="toy/prepared")
    assert given == [KeyPadding([3, 4]).bind(1, 4), KeyPadding([4, 2]).bind(1, 4)]
