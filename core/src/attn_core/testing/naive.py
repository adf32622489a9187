"""The naive run: attention as one would write it in the operands' own dtype, whose error is the measure of a kernel's.

Every product and every weight is rounded to the dtype, as in eager PyTorch. Two things are not, or the measure would be
too generous: the sum behind the LSE, which is float32 by contract, and a dense bias, whose rounding to half precision
would be an error of meaning. (The terms of that sum are rounded: torch's own half-precision kernel on the CPU takes
its exponentials with an error of 3e-5, far below what the dtype can hold.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bias import AttnBias, Paged, as_bias
from ..bias.paged import in_a_row

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
    if bias is not None:
        key, value, bias = in_a_row(key, value, bias)
    query, key, value = _heads_first(query, key, value, bias)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    logits = _logits(query, key, bias, scale, softcap, wide)
    out = _softmax(logits).to(query.dtype) @ value
    return out.transpose(1, 2), _logsumexp(logits, query.dtype)


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
    """The sums of attention and of its gradients with every factor replaced by its absolute value.

    A weight is as uncertain as the logits of its row are: an ulp of a logit of 10 changes it by 10 ulp. Logits are kept
    in float32 or better, so this counts for those dtypes alone.
    """
    group = query.shape[2] // key.shape[2]
    num_pages, pages = key.shape[0], None if bias is None else bias.paged
    if bias is not None:
        key, value, bias = in_a_row(key, value, bias)
    dtype = query.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    query, key, value = (x.detach().double() for x in _heads_first(query, key, value, bias))
    logits = _logits(query, key, bias, scale, softcap, torch.float64).detach()
    size = abs(scale)
    products = size * (query.abs() @ key.abs().mT)
    finite = torch.where(logits == MASKED, 0.0, torch.maximum(products, logits.abs()))
    largest = finite.amax(-1, keepdim=True) if finite.shape[-1] else finite.sum(-1, keepdim=True)
    weights = _softmax(logits) * (1.0 + largest * torch.finfo(wide).eps / torch.finfo(dtype).eps)
    grad = grad_out.double().abs().transpose(1, 2)
    to_weights = grad @ value.abs().mT
    to_row = (weights * to_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        to_row = to_row + grad_lse.double().abs().unsqueeze(-1)
    to_logits = weights * (to_weights + to_row)

    def grouped(x: Tensor) -> Tensor:  # [batch, num_heads, seqlen_kv, dim] -> heads-last, summed over a group of heads
        batch, num_heads, seqlen_kv, dim = x.shape
        rows = x.reshape(batch, num_heads // group, group, seqlen_kv, dim).sum(2).transpose(1, 2)
        return rows if pages is None else _in_pages(rows, pages, num_pages)

    return Terms(
        out=(weights @ value.abs()).transpose(1, 2),
        # The LSE is float32 also where the terms of its sum, relative to the largest, are exact to `dtype` only.
        lse=largest.squeeze(-1) + math.log(max(logits.shape[-1], 1)) + torch.finfo(dtype).eps / torch.finfo(wide).eps,
        query=(size * (to_logits @ key.abs())).transpose(1, 2),
        key=grouped(size * (to_logits.mT @ query.abs())),
        value=grouped(weights.mT @ grad),
        bias=to_logits,
    )


def _in_pages(rows: Tensor, pages: Paged, num_pages: int) -> Tensor:
    """`[num_pages, page_size, …]`: each page the sum of its places in `[batch, seqlen_kv, …]`."""
    into = rows.new_zeros(num_pages, pages.page_size, *rows.shape[2:])
    if num_pages == 0:
        return into
    table = pages.page_table.to(rows.device).long().reshape(-1).clamp(0, num_pages - 1)
    return into.index_add(0, table, rows.reshape(-1, *into.shape[1:]))


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
    return logits if bound is None else bound.apply(logits)


def _softmax(logits: Tensor) -> Tensor:
    """Weights over the last dimension; 0 in a row of nothing but -inf."""
    empty = (logits == MASKED).all(-1, keepdim=True)
    return torch.softmax(torch.where(empty, 0.0, logits), -1) * ~empty


def _logsumexp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the last dimension, the terms rounded to `dtype`; -inf for a row of nothing but -inf."""
    empty = (logits == MASKED).all(-1)
    if logits.shape[-1] == 0:
        return logits.sum(-1) + MASKED
    highest = logits.detach().amax(-1, keepdim=True).masked_fill(empty.unsqueeze(-1), 0.0)
    total = torch.exp(logits - highest).to(dtype).to(logits.dtype).sum(-1)
    return torch.where(empty, MASKED, highest.squeeze(-1) + torch.where(empty, 1.0, total).log())


def _bound(bias: AttnBias | None, query: Tensor, key: Tensor) -> AttnBias | None:
    given = as_bias(bias)
    return None if given is None else given.bind(query.shape[1], key.shape[1])
