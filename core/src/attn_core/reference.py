"""The reference: plain attention in float64. Short, slow and obviously right; everything is compared with it.

    logits  = softcap(scale * query · key) + bias
    weights = softmax(logits)
    out     = weights · value,   lse = log(sum(exp(logits)))

A row with no allowed key has out 0, lse -inf and gradient 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias import AttnBias, as_bias
from .bias.paged import in_a_row
from .by_methods import by_its_rule

MASKED = float("-inf")


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention written out, differentiable in every operand and in the bias.

    Args:
        query: `[batch, seqlen_q, num_heads, head_dim]`.
        key: `[batch, seqlen_kv, num_kv_heads, head_dim]`, or the pages of a Paged.
        value: `[batch, seqlen_kv, num_kv_heads, head_dim_v]`, or the pages of a Paged.
        bias: any bias, or a tensor (boolean: True = may attend; floating: added).
        dtype: what is computed and returned; float64, or the operands' own for a naive run to compare with.

    Returns:
        `(out, lse)`: `[batch, seqlen_q, num_heads, head_dim_v]` and `[batch, num_heads, seqlen_q]`, natural log.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[2] // key.shape[2]
    bound = by_its_rule(as_bias(bias), query, "reference_attention")
    if bound is not None:
        key, value, bound = in_a_row(key, value, bound)
        bound = bound.bind(query.shape[1], key.shape[1])
        valid = bound.valid_keys(key.device)
        if valid is not None:  # padding may be NaN, and NaN times a weight of 0 is NaN
            key = torch.where(valid[:, :, None, None], key, 0)
            value = torch.where(valid[:, :, None, None], value, 0)
    q = query.to(dtype).transpose(1, 2)
    k = key.to(dtype).transpose(1, 2).repeat_interleave(group, 1)
    v = value.to(dtype).transpose(1, 2).repeat_interleave(group, 1)

    logits = scale * (q @ k.mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bound is not None:
        logits = bound.apply(logits)
    return _softmax_times(logits, v, dropout_p)


def _softmax_times(logits: Tensor, value: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension times value, and the LSE; rows of nothing but -inf give 0 and -inf."""
    if logits.shape[-1] == 0:
        lse = torch.full(logits.shape[:-1], MASKED, dtype=logits.dtype, device=logits.device)
        return (logits @ value).transpose(1, 2), lse
    highest = logits.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == MASKED, 0.0)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + total.log()).masked_fill(empty, MASKED).squeeze(-1)
    weights = weights / total
    if dropout_p:  # which may be symbolic: torch.dropout takes a plain bool for whether it is on
        weights = torch.dropout(weights, dropout_p, train=True)
    return (weights @ value).transpose(1, 2), lse
