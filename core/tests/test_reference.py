"""The reference is obviously right: compared with loops over single numbers, and differentiated by finite differences.

Everything else in these tests is compared with the reference, so it is compared with nothing but arithmetic.
"""

from __future__ import annotations

import math

import pytest
import torch
from attn_core import Causal, KeyPadding, TensorBias, Window, reference_attention

INF = float("inf")


def by_loops(query, key, value, added, *, scale, softcap=None):
    """(out, lse) by Python floats; `added(b, h, q, k)` is what the bias adds to a logit."""
    batch, seqlen_q, num_heads, head_dim = query.shape
    _, seqlen_kv, num_kv_heads, head_dim_v = value.shape
    out = torch.zeros(batch, seqlen_q, num_heads, head_dim_v, dtype=torch.float64)
    lse = torch.full((batch, num_heads, seqlen_q), -INF, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            kv_head = h // (num_heads // num_kv_heads)
            for i in range(seqlen_q):
                weights = {}
                for j in range(seqlen_kv):
                    bias = added(b, h, i, j)
                    if bias == -INF:
                        continue
                    dot = math.fsum(float(query[b, i, h, d]) * float(key[b, j, kv_head, d]) for d in range(head_dim))
                    logit = scale * dot
                    if softcap is not None:
                        logit = softcap * math.tanh(logit / softcap)
                    weights[j] = math.exp(logit + bias)
                total = math.fsum(weights.values())
                if not weights:
                    continue
                lse[b, h, i] = math.log(total)
                for d in range(head_dim_v):
                    terms = [w * float(value[b, j, kv_head, d]) for j, w in weights.items()]
                    out[b, i, h, d] = math.fsum(terms) / total
    return out, lse


def operands(seed=0, *, batch=2, seqlen_q=3, seqlen_kv=4, num_heads=4, num_kv_heads=2, head_dim=5, head_dim_v=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, seqlen_q, num_heads, head_dim),
        (batch, seqlen_kv, num_kv_heads, head_dim),
        (batch, seqlen_kv, num_kv_heads, head_dim_v),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def float_bias(shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tensor.masked_fill(torch.rand(shape, generator=generator) < 0.3, -INF)


def entry(tensor, *index):
    """What a broadcast tensor has at [b, h, q, k]."""
    expanded = tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
    return float(expanded[tuple(0 if size == 1 else i for size, i in zip(expanded.shape, index))])


BOOLEAN = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
FLOATING = float_bias((2, 4, 3, 4))
PER_KEY = float_bias((2, 1, 1, 4))
BIASES = {
    "no bias": (None, lambda b, h, i, j: 0.0),
    "causal top-left": (Causal("top-left"), lambda b, h, i, j: 0.0 if j <= i else -INF),
    "causal bottom-right": (Causal("bottom-right"), lambda b, h, i, j: 0.0 if j <= i + 1 else -INF),
    "window": (Window(1, 0, "top-left"), lambda b, h, i, j: 0.0 if i - 1 <= j <= i else -INF),
    "key padding": (KeyPadding([0, 3]), lambda b, h, i, j: 0.0 if j < (0, 3)[b] else -INF),
    "boolean tensor with an empty row": (TensorBias(BOOLEAN), lambda b, h, i, j: 0.0 if BOOLEAN[i, j] else -INF),
    "floating tensor": (TensorBias(FLOATING), lambda *at: entry(FLOATING, *at)),
    "floating tensor per key": (TensorBias(PER_KEY), lambda *at: entry(PER_KEY, *at)),
}


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["no softcap", "softcap"])
@pytest.mark.parametrize("scale", [None, 0.0, -1.5], ids=["default scale", "scale 0", "negative scale"])
@pytest.mark.parametrize("name", BIASES)
def test_reference_equals_loops_over_single_numbers(name, scale, softcap):
    bias, added = BIASES[name]
    query, key, value = operands()
    out, lse = reference_attention(query, key, value, bias, scale=scale, softcap=softcap)
    wanted_scale = 5**-0.5 if scale is None else scale
    wanted_out, wanted_lse = by_loops(query, key, value, added, scale=wanted_scale, softcap=softcap)
    torch.testing.assert_close(out, wanted_out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-13, atol=1e-13)


def test_query_head_h_reads_key_head_h_over_group():
    query, key, value = operands(num_heads=6, num_kv_heads=2)
    out, _ = reference_attention(query, key, value)
    for h in range(6):
        alone, _ = reference_attention(query[:, :, [h]], key[:, :, [h // 3]], value[:, :, [h // 3]])
        torch.testing.assert_close(out[:, :, [h]], alone, rtol=1e-14, atol=1e-14)


def test_large_logits_do_not_overflow():
    query, key, value = operands()
    out, lse = reference_attention(query * 1e3, key * 1e3, value)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    logits = 5**-0.5 * torch.einsum("bqhd,bkhd->bhqk", query * 1e3, (key * 1e3).repeat_interleave(2, 2))
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))


def test_very_negative_logits_keep_their_lse():
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    _, lse = reference_attention(query, -200.0 * query, query)
    assert lse.item() == -200.0


def test_padding_may_be_nan_and_is_never_read():
    query, key, value = operands()
    clean = reference_attention(query, key, value, KeyPadding([2, 4]))
    key, value = key.clone(), value.clone()
    key[0, 2:], value[0, 2:] = float("nan"), INF
    for wanted, got in zip(clean, reference_attention(query, key, value, KeyPadding([2, 4]))):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("lengths", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_lengths_give_zero_and_minus_infinity(lengths):
    query, key, value = operands(seqlen_q=lengths[0], seqlen_kv=lengths[1])
    out, lse = reference_attention(query, key, value)
    assert out.shape == (2, lengths[0], 4, 3)
    assert lse.shape == (2, 4, lengths[0])
    assert (out == 0).all()
    assert (lse == -INF).all()


def requiring_grad(*tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


GRADIENT_CASES = {
    "no bias": (None, {}),
    "softcap": (None, {"softcap": 0.7}),
    "causal": (Causal("bottom-right"), {}),
    "window": (Window(1, 0, "top-left"), {"scale": 0.3}),
    "key padding with an empty entry": (KeyPadding([0, 3]), {}),
    "boolean tensor with an empty row": (TensorBias(BOOLEAN), {"softcap": 2.0}),
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_of_out_and_lse_equal_finite_differences(name):
    bias, options = GRADIENT_CASES[name]
    operands_ = requiring_grad(*operands(batch=2, seqlen_q=3, seqlen_kv=4, num_heads=2, num_kv_heads=1, head_dim=2))

    def both(query, key, value):
        out, lse = reference_attention(query, key, value, bias, **options)
        return out, lse.masked_fill(lse == -INF, 0.0)  # finite differences of -inf are NaN

    assert torch.autograd.gradcheck(both, operands_)


@pytest.mark.parametrize("shape", [(2, 4, 3, 4), (1, 4, 1, 4), (3, 4), (3, 1)], ids=str)
def test_gradient_to_the_bias_equals_finite_differences(shape):
    tensors = requiring_grad(
        *operands(num_heads=4, num_kv_heads=2, head_dim=2, head_dim_v=1), torch.randn(shape).double()
    )

    def both(query, key, value, tensor):
        return reference_attention(query, key, value, TensorBias(tensor), softcap=1.5)

    assert torch.autograd.gradcheck(both, tensors)


def test_second_derivatives_equal_finite_differences():
    tensors = requiring_grad(*operands(batch=1, seqlen_q=2, seqlen_kv=3, num_heads=2, num_kv_heads=1, head_dim=2))
    assert torch.autograd.gradgradcheck(lambda *x: reference_attention(*x, Causal("bottom-right"))[0], tensors)


def test_gradients_through_an_empty_row_are_zero():
    query, key, value = requiring_grad(*operands())
    tensor = FLOATING.clone()
    tensor[:, :, 1] = -INF
    tensor.requires_grad_()
    out, lse = reference_attention(query, key, value, TensorBias(tensor))
    assert (out[:, 1] == 0).all()
    assert (lse[..., 1] == -INF).all()
    finite = lse[torch.isfinite(lse)]
    gradients = torch.autograd.grad(out.sum() + finite.sum(), (query, key, value, tensor))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:, 1] == 0).all()
    assert (gradients[3][:, :, 1] == 0).all()


def test_a_gradient_fed_into_the_lse_of_an_empty_row_goes_nowhere():
    query, key, value = requiring_grad(*operands())
    out, lse = reference_attention(query, key, value, torch.zeros(3, 4, dtype=torch.bool))
    for gradient in torch.autograd.grad((out, lse), (query, key, value), (torch.ones_like(out), torch.ones_like(lse))):
        assert (gradient == 0).all()
