"""merge(): parts of attention joined are attention over all keys, empty parts included."""

from __future__ import annotations

import itertools

import pytest
import torch
from attn_core import InputError, InputTypeError, TensorBias, attention, merge, reference_attention

INF = float("inf")


def operands(seqlen_kv=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 6, 4, 8), (2, seqlen_kv, 2, 8), (2, seqlen_kv, 2, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parts(query, key, value, mask, cuts):
    """(outs, lses) of attention over the keys between neighbouring cuts."""
    pairs = [
        reference_attention(query, key[:, a:b], value[:, a:b], TensorBias(mask[:, a:b]), dtype=query.dtype)
        for a, b in itertools.pairwise(cuts)
    ]
    return [out for out, _ in pairs], [lse for _, lse in pairs]


def masked(*, rows_empty_in=()):
    """[6, 12]: some random keys, and for each (row, first key, last key) named none of those."""
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) > 0.2
    for row, first, last in rows_empty_in:
        mask[row, first:last] = False
    return mask


CASES = {
    "one-part": (masked(), (0, 12)),
    "two-parts": (masked(), (0, 5, 12)),
    "five-parts": (masked(), (0, 1, 4, 7, 9, 12)),
    "first-part-empty-for-a-row": (masked(rows_empty_in=[(1, 0, 5)]), (0, 5, 12)),
    "last-part-empty-for-a-row": (masked(rows_empty_in=[(2, 5, 12)]), (0, 5, 12)),
    "every-part-empty-for-a-row": (masked(rows_empty_in=[(3, 0, 12)]), (0, 5, 12)),
    "a-part-empty-for-every-row": (masked(rows_empty_in=[(row, 5, 12) for row in range(6)]), (0, 5, 12)),
    "a-part-without-keys": (masked(), (0, 5, 5, 12)),
}


@pytest.mark.parametrize(("mask", "cuts"), CASES.values(), ids=CASES)
def test_parts_joined_equal_the_whole(mask, cuts):
    query, key, value = operands()
    out, lse = merge(*parts(query, key, value, mask, cuts))
    want_out, want_lse = reference_attention(query, key, value, TensorBias(mask))
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mask", "cuts"), CASES.values(), ids=CASES)
def test_gradients_through_parts_equal_those_of_the_whole(mask, cuts):
    inputs = [x.requires_grad_() for x in operands()]

    def loss(out, lse):
        return out.square().sum() + torch.where(lse.isinf(), 0.0, lse).cos().sum()

    got = torch.autograd.grad(loss(*merge(*parts(*inputs, mask, cuts))), inputs)
    want = torch.autograd.grad(loss(*reference_attention(*inputs, TensorBias(mask))), inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck_with_an_empty_part():
    outs = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 2, dtype=torch.float64) for _ in range(3)]
    lses[1][0, 0, 1] = -INF
    lses = [lse.requires_grad_() for lse in (lses[0], lses[2])]
    empty = torch.full((1, 2, 2), -INF, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, c, x, y: merge([a, b, c], [x, y, empty]), (*outs, *lses))


def test_plus_infinity_counts_as_empty_and_nothing_of_that_part_leaks():
    out, lse = torch.randn(1, 2, 2, 3), torch.randn(1, 2, 2)
    joined, joined_lse = merge([out, torch.full_like(out, float("nan"))], [lse, torch.full_like(lse, INF)])
    torch.testing.assert_close(joined, out)
    torch.testing.assert_close(joined_lse, lse)


def test_large_logits_do_not_overflow():
    out = torch.ones(1, 1, 1, 2)
    joined, lse = merge([out, 3 * out], [torch.full((1, 1, 1), 1e4)] * 2)
    torch.testing.assert_close(joined, 2 * out)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1e4 + torch.log(torch.tensor(2.0)).item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_joined_in_float32_by_the_kernels_that_are_chosen(dtype):
    query, key, value = operands(dtype=dtype)
    pairs = [attention(query, key[:, cut], value[:, cut], return_lse=True) for cut in (slice(0, 7), slice(7, 12))]
    out, lse = merge(*zip(*pairs))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = reference_attention(query, key, value)[0]
    naive = reference_attention(query, key, value, dtype=dtype)[0]
    allowed = 2 * (naive.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
    assert (out.double() - want).abs().max() <= allowed


def test_it_is_traced_into_a_graph():
    pieces = parts(*operands(), *CASES["two-parts"])
    traced = torch.compile(merge, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*pieces), merge(*pieces))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    [
        ([], [], InputError, "as many outs as lses, at least one, got 0 and 0"),
        ([torch.ones(1, 2, 1, 3)], [], InputError, "got 1 and 0"),
        (None, [], InputTypeError, "outs must be a list or tuple of tensors, got NoneType"),
        ([torch.ones(1, 2, 1, 3)], torch.ones(1, 1, 2), InputTypeError, "lses must be a list .* got Tensor"),
        ([torch.ones(1, 2, 1, 3)], [torch.ones(1, 2, 1)], InputError, r"\[batch=1, num_heads=1, seqlen_q=2\], got"),
        ([torch.ones(2, 1, 3)], [torch.ones(1, 2, 1)], InputError, "outs must be"),
        (
            [torch.ones(1, 2, 1, 3, dtype=torch.int64)],
            [torch.ones(1, 1, 2)],
            InputTypeError,
            "must be a floating tensor",
        ),
        (
            [torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3).double()],
            [torch.ones(1, 1, 2)] * 2,
            InputTypeError,
            r"outs\[1\] must have the dtype torch.float32, got torch.float64",
        ),
        (
            [torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 4)],
            [torch.ones(1, 1, 2)] * 2,
            InputError,
            r"outs\[1\] must be \[1, 2, 1, 3\] on cpu, got \[1, 2, 1, 4\]",
        ),
        ([torch.ones(1, 2, 1, 3)], [torch.ones(1, 1, 2, device="meta")], InputError, "on cpu, got .* on meta"),
    ],
    ids=["none", "counts", "no-list", "a-tensor", "lse-shape", "rank", "integers", "dtypes", "shapes", "devices"],
)
def test_parts_that_do_not_fit_are_named(outs, lses, error, text):
    with pytest.raises(error, match=text):
        merge(outs, lses)
