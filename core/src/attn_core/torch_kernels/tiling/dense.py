"""The dense problems that tiles are: attention of a few queries to a few keys, by the best op of the device.

Operands are `[tiles, heads, rows, dim]` and `[tiles, kv_heads, columns, dim]`, of any strides but the last, which is
1: tiles are the batch of a dense kernel, so that it reads each head of keys for its group of query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = float("-inf")

_flash = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: `[tiles, heads, rows, dim]` and `[tiles, heads, rows]`.

    `mask` is additive, of four dimensions; `causal` has its corner at the top left, and `scale` above 0. A row without
    keys has out 0 and any LSE.
    """
    if query.device.type == "cpu":
        out, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    return plain_forward(query, key, value, mask, causal, scale)


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by matrix products, for any device."""
    logits = _logits(query, key, mask, causal, scale)
    lse = torch.logsumexp(logits, -1)
    weights = _weights(logits, lse)
    return _grouped_product(weights.to(value.dtype), value), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value; `out` and `lse` may be those over more keys than these.

    `lse` is finite: a row without keys has any finite number.
    """
    if query.device.type == "cpu":
        grads = _flash_backward(grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
        return grads[0], grads[1], grads[2]
    return plain_backward(grad_out, query, key, value, out, lse, mask, causal, scale)


def plain_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by matrix products, for any device."""
    to_query, to_key, to_value, _ = backward_with_logits(grad_out, query, key, value, out, lse, mask, causal, scale)
    return to_query, to_key, to_value


def backward_with_logits(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the gradient to what is added to the logits, `[tiles, heads, rows, columns]`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    weights = _weights(_logits(query, key, mask, causal, scale), lse)
    to_weights = _grouped_product(grad_out, value.mT).to(weights.dtype)
    delta = (grad_out * out).sum(-1, keepdim=True, dtype=weights.dtype)
    to_scores = weights * (to_weights - delta)
    to_logits = (scale * to_scores).to(query.dtype)
    weights = weights.to(query.dtype)

    def over_group(left: Tensor, right: Tensor) -> Tensor:  # [tiles, heads, columns, dim], summed to key heads
        product = left.mT @ right
        tiles, _, columns, dim = product.shape
        return product.view(tiles, kv_heads, heads // kv_heads, columns, dim).sum(2)

    return _grouped_product(to_logits, key), over_group(to_logits, query), over_group(weights, grad_out), to_scores


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    logits = _grouped_product(query, key.mT).to(wide) * scale
    if causal:
        rows, columns = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1), MASKED)
    return logits if mask is None else logits + mask


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(logits - lse.masked_fill(lse == MASKED, 0.0).unsqueeze(-1))


def _grouped_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, where a head of `right` serves a group of heads of `left`."""
    heads, kv_heads = left.shape[1], right.shape[1]
    if heads == kv_heads:
        return left @ right
    tiles, _, rows, dim = left.shape
    product = left.reshape(tiles, kv_heads, heads // kv_heads, rows, dim) @ right.unsqueeze(2)
    return product.flatten(1, 2)
