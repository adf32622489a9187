"""What a bias is in xFormers' terms: each form of it means the same, by xFormers' own dense form."""

from __future__ import annotations

import random

import pytest
import torch
from attn_core import Cached, Causal, KeyPadding, Neighborhood, PrefixLM, Segments, TensorBias, Window
from attn_core.bias.zero_padded import ZeroPadded
from attn_xformers.kernels.bands import from_both_corners, leaves_a_row_empty
from attn_xformers.kernels.forms import TENSOR, forms, may_leave_a_row_empty
from attn_xformers.kernels.operands import sent
from attn_xformers.kernels.read import SAYS

pytestmark = pytest.mark.usefixtures("fmha")

SEED = 20261121
CPU = torch.device("cpu")
CORNERS = ("top-left", "bottom-right")
LENGTHS = ((1, 1), (5, 5), (3, 5), (5, 3), (1, 6), (8, 13))


def masks(seqlen_q, seqlen_kv, rng):
    """Masks on these lengths, of every kind that has a form."""
    yield None
    for corner in CORNERS:
        yield Causal(corner)
        for left, right in ((0, 0), (2, 0), (0, 2), (3, 1), (None, 1), (2, None), (50, 0), (None, 0)):
            yield Window(left, right, corner)
    seqlens = torch.tensor([rng.randint(0, seqlen_kv) for _ in range(2)])
    yield KeyPadding(seqlens)
    for within in (Causal("bottom-right"), Window(2, 0, "bottom-right"), Window(1, 2, "bottom-right"), None):
        yield Cached(seqlens, within=within)
    yield Cached(seqlens, within=Window(None, 1, "bottom-right"))
    of_q, of_kv = drawn(seqlen_q, rng), drawn(seqlen_kv, rng)
    for within in (
        None,
        Causal("top-left"),
        Causal("bottom-right"),
        Window(1, 0, "top-left"),
        Window(2, 0, CORNERS[1]),
    ):
        yield Segments(of_q, of_kv, within=within)
        if seqlen_q == seqlen_kv:
            yield Segments(of_q, within=within)
    if of_kv[1]:
        for within in (None, Causal("bottom-right")):
            yield Segments(of_q, [of_kv[0], of_kv[1] - 1, 0], within=within, starts_kv=[0, of_kv[0] + 1, seqlen_kv])
    yield ZeroPadded(KeyPadding(seqlens))


def drawn(total, rng):
    """Three documents of so many tokens in all."""
    first = rng.randint(0, total)
    second = rng.randint(0, total - first)
    return [first, second, total - first - second]


def dense_of(form, seqlen_q, seqlen_kv, batch):
    """What xFormers' object lets through, `[batch, seqlen_q, seqlen_kv]`; checked to be nothing but 0 and -inf."""
    made = form.made(CPU)
    if made is None:
        return torch.ones(batch, seqlen_q, seqlen_kv, dtype=torch.bool)
    if not form.packed:
        dense = made.materialize((seqlen_q, seqlen_kv))
        assert ((dense == 0) | (dense == float("-inf"))).all()
        return (dense == 0).expand(batch, -1, -1)
    dense = made.materialize((batch * seqlen_q, batch * seqlen_kv))
    assert ((dense == 0) | (dense == float("-inf"))).all()
    blocks = (dense == 0).unflatten(1, (batch, seqlen_kv)).unflatten(0, (batch, seqlen_q))
    for one in range(batch):
        for other in range(batch):
            assert one == other or not blocks[one, :, other].any(), f"{form.kind}: batch entries see each other"
    return torch.stack([blocks[one, :, one] for one in range(batch)])


def test_every_form_of_a_mask_means_what_the_mask_means():
    rng, compared = random.Random(SEED), set()
    for lengths in LENGTHS:
        for given in masks(*lengths, rng):
            bias = None if given is None else given.bind(*lengths).normalize()
            want = torch.ones(2, *lengths, dtype=torch.bool)
            if bias is not None:
                dense = bias.materialize()
                want = dense.reshape((1,) * (4 - dense.ndim) + tuple(dense.shape))[:, 0].expand(2, *lengths)
            for form in forms(bias, 2, *lengths):
                try:
                    got = dense_of(form, *lengths, 2)
                except (ValueError, RuntimeError):
                    continue  # a class that takes no such lengths
                assert torch.equal(got, want), f"seed {SEED}: {bias!r} on {lengths} as {form.kind}"
                compared.add(form.kind)
    assert compared - {"NoneType"} == set(SAYS) - {
        "Tensor",
        "LowerTriangularMaskWithTensorBias",
    }  # which are compared below


def test_the_same_band_is_said_from_both_corners():
    for seqlen_q, seqlen_kv in LENGTHS:
        for corner in CORNERS:
            for left, right in ((2, 1), (None, 0), (0, None), (4, 4)):
                bias = Window(left, right, corner).bind(seqlen_q, seqlen_kv)
                (l0, r0), (l1, r1) = from_both_corners(bias, seqlen_q, seqlen_kv)
                q, k = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_kv)
                for shift, before, behind in ((0, l0, r0), (seqlen_kv - seqlen_q, l1, r1)):
                    kept = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool)
                    kept &= (k - q - shift >= -before) if before is not None else kept
                    kept &= (k - q - shift <= behind) if behind is not None else kept
                    assert torch.equal(kept, bias.materialize()), (bias, shift)


@pytest.mark.parametrize("lengths", LENGTHS, ids="{0[0]} x {0[1]}".format)
def test_it_is_known_beforehand_where_a_query_sees_no_key(lengths):
    rng = random.Random(SEED)
    for given in masks(*lengths, rng):
        if isinstance(given, (Causal, Window, Segments)):
            bias = given.bind(*lengths)
            empty = not bool(bias.materialize().any(-1).all())
            assert may_leave_a_row_empty(bias, *lengths) == empty, bias
    assert leaves_a_row_empty((None, None), 3, 0)
    assert not leaves_a_row_empty((None, None), 0, 0)


def test_what_xformers_has_no_word_for_has_no_form():
    for bias in (PrefixLM(3, "top-left"), Neighborhood(6, kernel_size=3)):
        assert not list(forms(bias.bind(6, 6), 1, 6, 6))
    assert not list(forms(Cached([3], within=Causal("top-left")).bind(3, 6), 1, 3, 6))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (4, 1, 7), (2, 1, 5, 7), (2, 4, 5, 7), (1,)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2], ids="{} key heads".format)
def test_a_tensor_is_expanded_in_full_with_rows_a_multiple_of_eight_apart(shape, dtype, kv_heads):
    generator = torch.Generator().manual_seed(SEED)
    tensor = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.rand(shape) > 0.4
    bias = TensorBias(tensor.to(dtype)).bind(5, 7)
    query, key = torch.zeros(2, 5, 4, 8, dtype=torch.float16), torch.zeros(2, 7, kv_heads, 8, dtype=torch.float16)
    [form] = forms(bias, 2, 5, 7)
    assert form.kind == TENSOR
    got = sent(query, key, key, form).attn_bias
    assert type(got) is torch.Tensor
    assert got.dtype is torch.float16
    assert all(stride % 8 == 0 for stride in got.stride()[:-1])
    assert got.stride(-1) == 1
    whole = got if kv_heads == 4 else got.flatten(1, 2)
    assert whole.shape == (2, 4, 5, 7)
    want = torch.zeros(()).where(bias.tensor, float("-inf")) if dtype is torch.bool else bias.tensor
    assert torch.equal(whole, want.to(torch.float16).expand(2, 4, 5, 7))


def test_a_causal_mask_and_a_tensor_are_one_object():
    tensor = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(SEED))
    bias = (TensorBias(tensor) + Causal("top-left")).bind(5, 7).normalize()
    [form] = forms(bias, 2, 5, 7)
    query, key = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 4, 8)
    got = sent(query, key, key, form).attn_bias
    assert torch.equal(got.materialize((2, 4, 5, 7)), bias.materialize())


def test_lengths_are_read_only_when_somebody_looks(fmha):
    seqlens = torch.tensor([2, 0, 5])
    bias = KeyPadding(seqlens).bind(3, 6)
    [form] = forms(bias, 3, 3, 6)
    made = form.made(CPU)
    assert made.k_seqinfo.seqlen.tolist() == [2, 0, 5]
    assert made.k_seqinfo.max_seqlen == 6  # what there is room for
    assert (len(made.k_seqinfo.seqlen_py), list(made.k_seqinfo.seqlen_py)) == (3, [2, 0, 5])
    assert made.k_seqinfo.seqlen_py[1:] == [0, 5]
