"""Each bias, by brute force over all small sizes: what it means is written here a second time, as a loop."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
import subprocess
import sys

import pytest
import torch
from attn_core import (
    AttnBias,
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    Mask,
    TensorBias,
    UnboundBiasError,
    Window,
    as_bias,
    attention,
)

SIZES = list(itertools.product(range(6), range(6)))
CORNERS = ("top-left", "bottom-right")
LIMITS = (None, 0, 1, 2, 5, 9)


def diagonal(corner, seqlen_q, seqlen_kv):
    return seqlen_kv - seqlen_q if corner == "bottom-right" else 0


def rule_of(mask):
    """The mask's meaning, written out: whether query i of entry b sees key j."""
    if isinstance(mask, Causal):
        return lambda b, i, j, n, m: j <= i + diagonal(mask.corner, n, m)
    if isinstance(mask, KeyPadding):
        return lambda b, i, j, n, m: j < int(mask.seqlens[b])

    def in_window(b, i, j, n, m):
        centre = i + diagonal(mask.corner, n, m)
        before = mask.left is None or j >= centre - mask.left
        behind = mask.right is None or j <= centre + mask.right
        return before and behind

    return in_window


def paddings(seqlen_kv):
    yield KeyPadding([seqlen_kv, 0])
    yield KeyPadding([min(1, seqlen_kv), seqlen_kv // 2])


def masks(seqlen_q, seqlen_kv):
    """Every mask that is legal at these lengths, bound."""
    corners = (*CORNERS, None) if seqlen_q == seqlen_kv else CORNERS
    for corner in corners:
        yield Causal(corner).bind(seqlen_q, seqlen_kv)
        for left, right in itertools.product(LIMITS, LIMITS):
            yield Window(left, right, corner).bind(seqlen_q, seqlen_kv)
    for padding in paddings(seqlen_kv):
        yield padding.bind(seqlen_q, seqlen_kv)


def dense(mask, seqlen_q, seqlen_kv):
    """The dense form by loops: nested lists [batch][seqlen_q][seqlen_kv]."""
    rule, batch = rule_of(mask), mask.batch_and_heads[0]
    return [
        [[rule(b, i, j, seqlen_q, seqlen_kv) for j in range(seqlen_kv)] for i in range(seqlen_q)] for b in range(batch)
    ]


def materialized(mask, seqlen_q, seqlen_kv):
    batch = mask.batch_and_heads[0]
    return mask.materialize().expand(batch, 1, seqlen_q, seqlen_kv)[:, 0].tolist()


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_dense_form_equals_the_rule_written_as_a_loop(lengths):
    for mask in masks(*lengths):
        assert materialized(mask, *lengths) == dense(mask, *lengths), mask


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_span_covers_every_key_that_a_block_of_queries_sees(lengths):
    seqlen_q, seqlen_kv = lengths
    for mask in masks(*lengths):
        table = dense(mask, *lengths)
        for q0, q1 in itertools.combinations(range(seqlen_q + 1), 2):
            low, high = mask.span(q0, q1)
            assert 0 <= low <= high <= seqlen_kv, mask
            seen = [j for entry in table for i in range(q0, q1) for j in range(seqlen_kv) if entry[i][j]]
            assert all(low <= j < high for j in seen), f"{mask}: rows {q0} to {q1} see {seen}, span {low, high}"


@pytest.mark.parametrize("lengths", [n for n in SIZES if max(n) < 5 or n == (5, 5)], ids=str)
def test_a_tile_called_empty_has_no_pair_and_one_called_full_has_all(lengths):
    seqlen_q, seqlen_kv = lengths
    blocks_q = list(itertools.combinations(range(seqlen_q + 1), 2))
    blocks_kv = list(itertools.combinations(range(seqlen_kv + 1), 2))
    for mask in masks(*lengths):
        table = dense(mask, *lengths)
        for (q0, q1), (k0, k1) in itertools.product(blocks_q, blocks_kv):
            kind = mask.tile(q0, q1, k0, k1)
            pairs = [entry[i][j] for entry in table for i in range(q0, q1) for j in range(k0, k1)]
            assert kind in ("empty", "full", "mixed")
            assert kind != "empty" or not any(pairs), f"{mask}: tile {q0, q1, k0, k1} called empty"
            assert kind != "full" or all(pairs), f"{mask}: tile {q0, q1, k0, k1} called full"


@pytest.mark.parametrize(
    "kind", [Causal("bottom-right"), Window(2, 1, "top-left"), Window(None, 0, "bottom-right")], ids=repr
)
def test_tiles_are_sharp_where_the_rule_is_a_diagonal(kind):
    """An answer of "mixed" everywhere would be legal, and would skip nothing."""
    mask = kind.bind(6, 9)
    table = dense(mask, 6, 9)[0]
    for q0, k0 in itertools.product(range(0, 6, 2), range(0, 9, 3)):
        pairs = [table[i][j] for i in range(q0, q0 + 2) for j in range(k0, k0 + 3)]
        assert mask.tile(q0, q0 + 2, k0, k0 + 3) == ("full" if all(pairs) else "mixed" if any(pairs) else "empty")


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_pairs_are_counted_as_the_dense_form_has_them(lengths):
    for mask in masks(*lengths):
        if isinstance(mask, KeyPadding):  # its lengths may lie on a device: an estimate, from above
            assert mask.pairs() == lengths[0] * lengths[1]
            continue
        assert mask.pairs() == sum(map(sum, dense(mask, *lengths)[0])), mask


@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_normalize_never_changes_the_dense_form(lengths):
    for mask in masks(*lengths):
        simple = mask.normalize()
        wanted = materialized(mask, *lengths)
        if simple is None:
            assert all(all(row) for entry in wanted for row in entry), f"{mask} is not nothing"
        else:
            assert materialized(simple, *lengths) == wanted, f"{mask} -> {simple}"
            assert simple.normalize() == simple, "normalizing twice is normalizing once"


def test_normalize_finds_the_simplest_kind():
    assert Window(None, None, "top-left").bind(3, 5).normalize() is None
    assert Window(9, 9).bind(5, 5).normalize() is None
    assert Window(None, 0, "bottom-right").bind(3, 5).normalize() == Causal("bottom-right").bind(3, 5)
    assert Window(4, 0).bind(5, 5).normalize() == Causal("top-left").bind(5, 5)
    assert Causal("bottom-right").bind(5, 5).normalize() == Causal("top-left").bind(5, 5)
    assert Causal("bottom-right").bind(1, 7).normalize() is None  # a decoding step
    assert Causal().bind(4, 4).normalize() == Causal("top-left").bind(4, 4)


# Binding


@pytest.mark.parametrize("kind", [Causal, lambda corner=None: Window(1, 1, corner)], ids=["Causal", "Window"])
def test_no_corner_is_an_error_on_unequal_lengths_that_names_both(kind):
    with pytest.raises(InputError, match=r'(?s)seqlen_q=3.*seqlen_kv=5.*"top-left".*"bottom-right"'):
        kind().bind(3, 5)
    assert kind().bind(4, 4).lengths == (4, 4)


@pytest.mark.parametrize(
    "bias",
    [Causal("top-left"), Window(1, 1, "top-left"), KeyPadding([1, 2]), TensorBias(torch.zeros(1, 1))],
    ids=lambda bias: type(bias).__name__,
)
def test_a_bound_bias_refuses_other_lengths_and_takes_its_own(bias):
    bound = bias.bind(3, 4)
    assert bound.bind(3, 4) == bound
    with pytest.raises(InputError, match=r"made for seqlen_q=3, seqlen_kv=4, got seqlen_q=5, seqlen_kv=4"):
        bound.bind(5, 4)


@pytest.mark.parametrize("length", [-1, 2.0, "4", None, True, torch.tensor(4)], ids=repr)
@pytest.mark.parametrize(
    "bias",
    [Causal("top-left"), Window(1, 1, "top-left"), KeyPadding([0]), TensorBias(torch.zeros(1, 1))],
    ids=lambda bias: type(bias).__name__,
)
def test_what_is_no_length_is_refused_by_name(bias, length):
    with pytest.raises(InputError, match=re.escape(f"seqlen_q must be an int >= 0, got {length!r}")):
        bias.bind(length, 4)
    with pytest.raises(InputError, match=re.escape(f"seqlen_kv must be an int >= 0, got {length!r}")):
        bias.bind(4, length)


@pytest.mark.parametrize("question", ["materialize", "pairs", "normalize", "draw"])
def test_an_unbound_mask_asked_for_its_lengths_names_bind(question):
    with pytest.raises(UnboundBiasError, match=r"bind\(seqlen_q, seqlen_kv\)"):
        getattr(Causal("top-left"), question)()


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (2, 2, 2, 4), (1, 1, 1, 1, 4), (2,)], ids=str)
def test_a_tensor_that_does_not_broadcast_says_to_what(shape):
    with pytest.raises(InputError, match=r"does not broadcast to\s.*seqlen_q=3, seqlen_kv=4"):
        TensorBias(torch.zeros(shape)).bind(3, 4)


@pytest.mark.parametrize("shape", [(), (4,), (1,), (3, 1), (1, 4), (2, 3, 4), (1, 1, 1, 1)], ids=str)
def test_a_tensor_that_broadcasts_binds(shape):
    bound = TensorBias(torch.zeros(shape)).bind(3, 4)
    assert torch.broadcast_shapes(bound.materialize().shape, (5, 2, 3, 4)) == (5, 2, 3, 4)


def test_key_padding_checks_its_lengths_when_it_is_bound():
    with pytest.raises(InputError, match=r"\[0, seqlen_kv=4\], got \[2, 5\]"):
        KeyPadding([2, 5]).bind(3, 4)
    with pytest.raises(InputError, match=r"got \[-1\]"):
        KeyPadding([-1]).bind(3, 4)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Causal("left"), InputError, '"top-left" or "bottom-right", got \'left\''),
        (lambda: Window(1, 1, "left"), InputError, '"top-left" or "bottom-right", got \'left\''),
        (lambda: Window(-1, 0), InputError, "left .* must be an int >= 0,\n? ?or None for no limit; got -1"),
        (lambda: Window(0, 1.5), InputError, "right .* got 1.5"),
        (lambda: Window(True, 0), InputError, "left .* got True"),
        (lambda: Window(3, "0"), InputError, "right .* got '0'"),
        (lambda: Window([3], 0), InputError, r"left .* got \[3\]"),
        (lambda: Window(0, torch.tensor(3)), InputError, r"right .* got tensor\(3\)"),
        (lambda: KeyPadding([1.5]), InputTypeError, r"must be an integer tensor, or ints .* got \[1.5\]"),
        (lambda: KeyPadding(3), InputTypeError, "must be an integer tensor, or ints .* got 3"),
        (lambda: KeyPadding(None), InputTypeError, "must be an integer tensor, or ints .* got None"),
        (lambda: KeyPadding(torch.ones(2)), InputTypeError, "integer tensor, got torch.float32"),
        (lambda: KeyPadding(torch.ones(2, 3, dtype=torch.bool)), InputTypeError, "TensorBias"),
        (lambda: KeyPadding(torch.ones(2, 3, dtype=torch.int64)), InputError, r"\[batch\], got shape \[2, 3\]"),
        (
            lambda: TensorBias(torch.ones(2, 3, dtype=torch.int64)),
            InputTypeError,
            "boolean .* floating .* got torch.int64",
        ),
        (lambda: TensorBias([[0.0]]), InputTypeError, "takes a tensor, got list"),
    ],
)
def test_a_bias_that_cannot_be_says_what_is_accepted(make, error, text):
    with pytest.raises(error, match=text):
        make()


# Values


def examples():
    generator = torch.Generator().manual_seed(1)
    return [
        Causal(),
        Causal("top-left"),
        Causal("bottom-right").bind(2, 3),
        Window(1, None, "top-left"),
        Window(0, 2).bind(4, 4),
        KeyPadding([1, 3]),
        KeyPadding(torch.tensor([1, 3], dtype=torch.int32)).bind(2, 3),
        TensorBias(torch.randn(2, 3, generator=generator)),
        TensorBias(torch.randn(2, 3, generator=generator) > 0).bind(2, 3),
    ]


NAMES = [f"{i} {bias!r}" for i, bias in enumerate(examples())]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_bias_is_a_value_equal_to_one_made_alike(index):
    one, two = examples()[index], examples()[index]
    assert one == two
    assert hash(one) == hash(two)
    assert one.key == two.key
    for other in examples()[:index] + examples()[index + 1 :]:
        assert one != other
        assert one.key != other.key
    assert one != "a string"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_bias_survives_copies(index, copied):
    bias = examples()[index]
    again = copied(bias)
    assert type(again) is type(bias)
    assert again == bias
    assert again.lengths == bias.lengths
    assert again.key == bias.key


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_bias_is_frozen(index):
    bias = examples()[index]
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        bias.lengths = (1, 1)


def test_tensor_biases_of_other_numbers_are_unequal_though_their_keys_agree():
    one, two = TensorBias(torch.zeros(2, 3)), TensorBias(torch.ones(2, 3))
    assert one.key == two.key
    assert one != two
    assert KeyPadding([1, 2]) != KeyPadding([2, 2])


def test_the_key_of_a_tensor_bias_follows_its_tensor():
    bias = TensorBias(torch.zeros(2, 3))
    before = bias.key
    bias.tensor.requires_grad_()
    assert bias.key != before
    assert TensorBias(torch.zeros(3, 2).T).key != TensorBias(torch.zeros(2, 3)).key


def test_without_data_keeps_all_but_the_numbers():
    tensor = torch.randn(2, 1, 3, 4, dtype=torch.float16, requires_grad=True)
    for bias in (TensorBias(tensor).bind(3, 4), KeyPadding([1, 2]).bind(3, 4)):
        plain = bias.without_data()
        assert plain.lengths == (3, 4)
        assert plain.batch_and_heads == (2, 1)
        assert plain.requires_grad == bias.requires_grad
        held = plain.tensor if isinstance(plain, TensorBias) else plain.seqlens
        assert held.is_meta


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (Causal(), "Causal()"),
        (Causal("top-left"), 'Causal("top-left")'),
        (Causal("bottom-right").bind(2, 3), 'Causal("bottom-right").bind(2, 3)'),
        (Window(1, None), "Window(1, None)"),
        (Window(1, 2, "top-left"), 'Window(1, 2, "top-left")'),
        (KeyPadding([1, 3]), "KeyPadding([1, 3])"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr_is_what_one_would_type(bias, text):
    assert repr(bias) == text
    assert eval(text) == bias


def test_repr_of_a_tensor_bias_has_shape_dtype_and_gradient():
    assert repr(TensorBias(torch.zeros(2, 3, requires_grad=True))) == "TensorBias([2, 3] float32, requires_grad)"


def test_draw_shows_the_matrix():
    assert Window(2, 1).bind(5, 5).draw() == "██···\n███··\n████·\n·████\n··███"
    assert Causal("bottom-right").bind(3, 5).draw() == "███··\n████·\n█████"
    assert KeyPadding([3, 5]).bind(2, 5).draw() == "███··\n███··"


def test_draw_cuts_a_large_matrix():
    lines = Causal().bind(100, 100).draw().splitlines()
    assert len(lines) == 17
    assert lines[-1] == "⋮"
    assert lines[0] == "█" + "·" * 63 + " …"


# as_bias


def test_as_bias_takes_none_biases_and_tensors():
    assert as_bias(None) is None
    bias = Causal("top-left")
    assert as_bias(bias) is bias
    tensor = torch.zeros(2, 3)
    assert as_bias(tensor).tensor is tensor
    parameter = torch.nn.Parameter(tensor)
    assert as_bias(parameter).tensor is parameter


def test_as_bias_takes_torchs_own_causal_bias():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    assert as_bias(causal_upper_left(3, 5)) == Causal("top-left").bind(3, 5)
    assert as_bias(causal_lower_right(3, 5)) == Causal("bottom-right").bind(3, 5)


@pytest.mark.parametrize("corner", CORNERS)
def test_torchs_causal_bias_means_the_same_here(corner):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    torch.manual_seed(0)
    foreign = (causal_upper_left if corner == "top-left" else causal_lower_right)(3, 5)
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, foreign)
    got = attention(*(x.transpose(1, 2) for x in (query, key, value)), foreign).transpose(1, 2)
    torch.testing.assert_close(got, wanted)


def test_recognising_torchs_causal_bias_imports_nothing():
    code = (
        "import sys, torch, attn_core\n"
        "x = torch.randn(1, 3, 2, 8)\n"
        "attn_core.attention(x, x, x, attn_core.Causal())\n"
        "assert 'torch.nn.attention.bias' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_as_bias_names_what_it_takes():
    with pytest.raises(InputTypeError, match=r"(?s)takes None, AttnBias, torch\.Tensor.*got str.*as_bias\.register"):
        as_bias("causal")


class Foreign:
    def __init__(self, reach: int) -> None:
        self.reach = reach


class MoreForeign(Foreign):
    pass


@pytest.mark.parametrize(
    "named", [Foreign, f"{Foreign.__module__}.{Foreign.__qualname__}"], ids=["class", "dotted name"]
)
def test_a_foreign_class_and_its_subclasses_can_be_registered(named, monkeypatch):
    from attn_core.bias import convert

    monkeypatch.setattr(convert, "_converters", dict(convert._converters))
    as_bias.register(named, lambda bias: Window(bias.reach, bias.reach))
    assert as_bias(Foreign(2)) == Window(2, 2)
    assert as_bias(MoreForeign(1)) == Window(1, 1)


@dataclasses.dataclass(frozen=True)
class EveryOther(Mask):
    """A stranger's kind: every second key. It knows nothing of the kernels."""

    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return (k % 2 == 0) & (q == q)


@pytest.mark.parametrize("kernel", ["torch/flash", "torch/math", "torch/flex", "torch/reference"])
def test_a_strangers_kind_runs_at_once_on_every_kernel(kernel):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 6, 2, 8) for _ in range(3))
    wanted = attention(query, key[:, ::2], value[:, ::2])
    torch.testing.assert_close(attention(query, key, value, EveryOther(), kernel=kernel), wanted)


def test_a_bias_must_answer_what_the_abstract_class_asks():
    class Nothing(AttnBias):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()
