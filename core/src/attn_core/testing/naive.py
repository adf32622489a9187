"""The naive run: attention as one would write it in the operands' own dtype, whose error is the measure of a kernel's.

Every product and every weight is rounded to the dtype, as in eager PyTorch. Two things are not, since every kernel
keeps them in float32 whatever the operands are, and the measure would otherwise be too generous: the LSE, which is
returned in float32, and a dense bias, whose rounding to half precision would be an error of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bias import AttnBias, as_bias

MASKED = float("-inf")


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of heads-last operands: `[batch, seqlen_q, num_heads, head_dim_v]` in their dtype and
    `[batch, num_heads, seqlen_q]` in float32 (float64 for float64)."""
    query, key, value = _heads_first(query, key, value, bias)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    weights = _softmax(_logits(query, key, bias, scale, softcap, wide))
    out = weights.to(query.dtype) @ value
    lse = _logsumexp(_logits(query.to(wide), key.to(wide), bias, scale, softcap, wide))
    return out.transpose(1, 2), lse


@dataclass(frozen=True)
class Terms:
    """How large the terms are that each result sums up; float64, in the shape of the result."""

    out: Tensor
    lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor  #: `[batch, num_heads, seqlen_q, seqlen_kv]`, to be summed to the bias's shape


def terms_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Terms:
    """The sums of attention and of its gradients with every factor replaced by its absolute value."""
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.detach().double() for x in _heads_first(query, key, value, bias))
    logits = _logits(query, key, bias, scale, softcap, torch.float64).detach()
    weights = _softmax(logits)
    grad = grad_out.double().abs().transpose(1, 2)
    to_weights = grad @ value.abs().mT
    to_row = (weights * to_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        to_row = to_row + grad_lse.double().abs().unsqueeze(-1)
    to_logits = weights * (to_weights + to_row)
    size = abs(scale)

    def grouped(x: Tensor) -> Tensor:  # [batch, num_heads, seqlen_kv, dim] -> heads-last, summed over a group of heads
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    products = size * (query.abs() @ key.abs().mT)
    finite = torch.where(logits == MASKED, 0.0, torch.maximum(products, logits.abs()))
    return Terms(
        out=(weights @ value.abs()).transpose(1, 2),
        lse=finite.amax(-1) + 1.0 if finite.shape[-1] else finite.sum(-1),
        query=(size * (to_logits @ key.abs())).transpose(1, 2),
        key=grouped(size * (to_logits.mT @ query.abs())),
        value=grouped(weights.mT @ grad),
        bias=to_logits,
    )


def _heads_first(query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None) -> tuple[Tensor, Tensor, Tensor]:
    """`[batch, num_heads, seqlen, dim]` with a key head for each query head, and zeros for padding."""
    bound = _bound(bias, query, key)
    valid = None if bound is None else bound.valid_keys(key.device)
    if valid is not None:
        key, value = (torch.where(valid[:, :, None, None], x, 0) for x in (key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    return query.transpose(1, 2), key, value


def _logits(
    query: Tensor, key: Tensor, bias: AttnBias | None, scale: float, softcap: float | None, wide: torch.dtype
) -> Tensor:
    logits = scale * (query @ key.mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(wide)
    bound = _bound(bias, query.transpose(1, 2), key.transpose(1, 2))
    if bound is None:
        return logits
    dense = bound.materialize(logits.device)
    return torch.where(dense, logits, MASKED) if dense.dtype is torch.bool else logits + dense.to(wide)


def _softmax(logits: Tensor) -> Tensor:
    """Weights over the last dimension; 0 in a row of nothing but -inf."""
    empty = (logits == MASKED).all(-1, keepdim=True)
    return torch.softmax(torch.where(empty, 0.0, logits), -1) * ~empty


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last dimension; -inf, without a NaN in its gradient, for a row of nothing but -inf."""
    empty = (logits == MASKED).all(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(empty, 0.0, logits), -1)
    return torch.where(empty.squeeze(-1), MASKED, lse)


def _bound(bias: AttnBias | None, query: Tensor, key: Tensor) -> AttnBias | None:
    given = as_bias(bias)
    return None if given is None else given.bind(query.shape[1], key.shape[1])
