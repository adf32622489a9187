"""Derivatives of the unfused operations: first and second order, reverse and forward, of samples and of batches."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from attn_core.errors import InputError
from attn_natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from torch.autograd import forward_ad, gradcheck, gradgradcheck

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from unfused_problems import SEED

CALLS = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}
NEAR = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}
#: (batch, heads, length, head_dim, kernel_size, dilation)
SIZES = [(1, 1, 5, 8, 5, 1), (2, 2, 16, 8, 5, 1), (2, 2, 16, 8, 5, 3), (2, 2, 7, 4, 3, 2)]


def draw(*shapes, **options):
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, **options) for shape in shapes]


def leaves(*shapes):
    return [tensor.requires_grad_() for tensor in draw(*shapes)]


@pytest.mark.parametrize("tokens", [0, 9], ids="{} tokens".format)
@pytest.mark.parametrize("kind", ["plain", "rpb", "causal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_qk(size, kind, tokens):
    batch, heads, length, dim, kernel, dilation = size
    grid = (batch, heads, length, dim)
    query, key, additional, rpb = leaves(grid, grid, (batch, heads, tokens, dim), (heads, 2 * kernel - 1))

    def call(query, key, additional, rpb):
        attn = na1d_qk(
            query,
            key,
            kernel,
            dilation,
            additional_keys=additional if tokens else None,
            is_causal=kind == "causal",
            rpb=rpb if kind == "rpb" else None,
        )
        return attn.softmax(-1) if kind == "causal" else attn

    assert gradcheck(call, (query, key, additional, rpb), fast_mode=batch > 1, **NEAR)


@pytest.mark.parametrize("tokens", [0, 9], ids="{} tokens".format)
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_av(size, causal, tokens):
    batch, heads, length, dim, kernel, dilation = size
    attn, value, additional = leaves(
        (batch, heads, length, kernel + tokens), (batch, heads, length, dim), (batch, heads, tokens, dim)
    )

    def call(attn, value, additional):
        return na1d_av(attn, value, kernel, dilation, additional if tokens else None, causal)

    assert gradcheck(call, (attn, value, additional), fast_mode=batch > 1, **NEAR)


#: (extents, kernel_size, dilation, is_causal)
WINDOWS = [
    ((6,), 3, 2, False),
    ((5,), 3, 1, True),
    ((3, 5), (3, 2), (1, 2), False),
    ((4, 3), (2, 3), (2, 1), (True, False)),
    ((2, 3, 4), (2, 3, 2), (1, 1, 2), (False, True, False)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_second_order(window):
    extents, *window = window
    qk, av = CALLS[len(extents)]
    query, key, value = leaves(*[(1, 2, *extents, 2)] * 3)

    def call(query, key, value):
        return av(qk(query, key, *window[:2], is_causal=window[2]).softmax(-1), value, *window[:2], None, window[2])

    assert gradgradcheck(call, (query, key, value), fast_mode=True, **NEAR)


def test_second_order_of_the_bias():
    query, key, value, rpb = leaves(*[(1, 2, 4, 5, 2)] * 3, (2, 5, 5))

    def call(query, key, value, rpb):
        return na2d_av(na2d_qk(query, key, 3, rpb=rpb).softmax(-1), value, 3)

    assert gradcheck(call, (query, key, value, rpb), fast_mode=True, **NEAR)
    assert gradgradcheck(call, (query, key, value, rpb), fast_mode=True, **NEAR)


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 1)], ids="without {}".format)
def test_a_gradient_that_is_not_asked_for_is_not_given(missing):
    inputs = draw(*[(1, 2, 6, 3)] * 3)
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index not in missing)
    query, key, value = inputs
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    out = na1d_av(na1d_qk(query, key, 3).softmax(-1), value, 3)
    everything = [tensor.detach().requires_grad_() for tensor in inputs]
    query, key, value = everything
    whole = na1d_av(na1d_qk(query, key, 3).softmax(-1), value, 3)
    expected = dict(enumerate(torch.autograd.grad(whole.sum(), everything)))
    got = torch.autograd.grad(out.sum(), wanted)
    torch.testing.assert_close(list(got), [grad for index, grad in expected.items() if index not in missing])


# Forward mode


def tangent_of(function, primals, tangents):
    """(out, its tangent); a tangent of None is missing."""
    with forward_ad.dual_level():
        duals = [
            primal if tangent is None else forward_ad.make_dual(primal, tangent)
            for primal, tangent in zip(primals, tangents)
        ]
        out, tangent = forward_ad.unpack_dual(function(*duals))
        return out, tangent


@pytest.mark.parametrize("present", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tangents_of_qk_are_those_of_its_products(window, present):
    extents, kernel, dilation, causal = window
    qk, _ = CALLS[len(extents)]
    grid, tokens = (1, 2, *extents, 3), (1, 2, 4, 3)
    *primals, d_query, d_key, d_tokens = draw(grid, grid, tokens, grid, grid, tokens)
    tangents = [tangent if there else None for tangent, there in zip((d_query, d_key, d_tokens), present)]

    def call(query, key, tokens):
        return qk(query, key, kernel, dilation, tokens, causal)

    out, tangent = tangent_of(call, primals, tangents)
    torch.testing.assert_close(out, call(*primals))
    query, key, tokens = primals
    zeros = [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in zip(primals, tangents)]
    expected = call(zeros[0], key, tokens) + call(query, zeros[1], zeros[2])
    torch.testing.assert_close(tangent, expected.masked_fill(out.isneginf(), 0.0))


@pytest.mark.parametrize("present", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tangents_of_av_are_those_of_its_products(window, present):
    extents, kernel, dilation, causal = window
    _, av = CALLS[len(extents)]
    width = len(extents) * [kernel] if isinstance(kernel, int) else kernel
    width = int(torch.tensor(width).prod()) + 4
    shapes = (1, 2, *extents, width), (1, 2, *extents, 3), (1, 2, 4, 3)
    *primals, d_attn, d_value, d_tokens = draw(*shapes, *shapes)
    tangents = [tangent if there else None for tangent, there in zip((d_attn, d_value, d_tokens), present)]

    def call(attn, value, tokens):
        return av(attn, value, kernel, dilation, tokens, causal)

    out, tangent = tangent_of(call, primals, tangents)
    torch.testing.assert_close(out, call(*primals))
    attn, value, tokens = primals
    zeros = [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in zip(primals, tangents)]
    torch.testing.assert_close(tangent, call(zeros[0], value, tokens) + call(attn, zeros[1], zeros[2]))


def test_tangents_through_a_causal_softmax_are_finite_and_right():
    query, key, value, *tangents = draw(*[(1, 2, 3, 5, 3)] * 6)

    def call(query, key, value):
        return na2d_av(na2d_qk(query, key, 3, is_causal=True).softmax(-1), value, 3, is_causal=True)

    _, tangent = tangent_of(call, (query, key, value), tangents)
    step = 1e-6
    ends = [call(*(x + sign * step * d for x, d in zip((query, key, value), tangents))) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), atol=1e-8, rtol=1e-6)


def test_tangents_have_gradients():
    query, key, d_query = leaves(*[(1, 1, 5, 2)] * 3)
    out = torch.func.jvp(lambda q: na1d_qk(q, key, 3).square(), (query,), (d_query,))[1]
    (got,) = torch.autograd.grad(out.sum(), key)
    (expected,) = torch.autograd.grad((2 * na1d_qk(query, key, 3) * na1d_qk(d_query, key, 3)).sum(), key)
    torch.testing.assert_close(got, expected)


def test_a_bias_beside_a_tangent_is_an_error():
    query, key, tangent, rpb = draw(*[(1, 2, 5, 2)] * 3, (2, 5))
    with pytest.raises(InputError, match="rpb: a relative positional bias is not supported in forward-mode"):
        tangent_of(lambda q: na1d_qk(q, key, 3, rpb=rpb), (query,), (tangent,))


# torch.func


def test_samples_of_vmap_are_computed_like_one_by_one():
    query, key, value = draw((4, 2, 2, 5, 6, 3), (2, 2, 5, 6, 3), (2, 2, 5, 4, 6, 3))

    def call(query, key, value):
        return na2d_av(na2d_qk(query, key, 3).softmax(-1), value, 3)

    got = torch.vmap(call, (0, None, 3))(query, key, value)
    expected = torch.stack([call(query[i], key, value.select(3, i)) for i in range(4)])
    torch.testing.assert_close(got, expected)


def test_gradients_of_each_sample():
    query, key, value, rpb = draw((3, 1, 2, 5, 2), (1, 2, 5, 2), (1, 2, 5, 2), (2, 5))

    def loss(query, key, value, rpb):
        return na1d_av(na1d_qk(query, key, 3, rpb=rpb).softmax(-1), value, 3).square().sum()

    got = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), (0, None, None, None))(query, key, value, rpb)
    for index in range(3):
        inputs = [x.detach().clone().requires_grad_() for x in (query[index], key, value, rpb)]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        torch.testing.assert_close([grad[index] for grad in got], list(expected))
