"""Tiled attention as one differentiable function: `(query, key, value, mask, scale) -> (out, lse)`, heads-first.

The backward computes the weights anew from the LSE, as FlashAttention does. A gradient to the LSE is one more column:
see `flash_lse`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...bias import Mask
from .cut import WIDE, tiling_of
from .runs import MASKED, Grads, Lanes

#: Columns that are added to say the LSE's gradient: one is needed, and a row stays aligned.
COLUMNS = 8


def forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `scale` is above 0."""
    tiling = tiling_of(mask, query, backward=False)
    wide = WIDE.get(query.dtype, query.dtype)
    dtype = wide if tiling.joins else query.dtype  # what is joined is rounded once
    lse_shape = query.shape[:3]
    if tiling.covers and not tiling.joins:
        out = torch.empty_like(query, dtype=dtype)
        lse = torch.empty(lse_shape, dtype=wide, device=query.device)
    else:
        out = torch.zeros_like(query, dtype=dtype)
        lse = torch.full(lse_shape, MASKED, dtype=wide, device=query.device)
    operands = Lanes(_readable(query), _readable(key), _readable(value), out, lse, scale)
    for part in tiling.parts:
        part.forward(operands)
    return out.to(query.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value."""
    tiling = tiling_of(mask, query, backward=True)
    dim = query.shape[3]
    empty = lse == MASKED
    if grad_lse is not None:  # a row without keys has a constant LSE
        grad_lse = grad_lse.masked_fill(empty, 0.0).unsqueeze(-1).to(out.dtype)
        grad_out, out = pad(grad_out, (0, COLUMNS), value=1.0), torch.cat([out, -grad_lse], -1)
        out = pad(out, (0, COLUMNS - 1))
        query, key, value = (pad(x, (0, COLUMNS)) for x in (query, key, value))
    lse = lse.masked_fill(empty, 0.0)
    wide = WIDE.get(query.dtype, query.dtype)
    grads = Grads(_readable(grad_out), *(torch.zeros_like(x, dtype=wide) for x in (query, key, value)))
    operands = Lanes(_readable(query), _readable(key), _readable(value), _readable(out), lse, scale)
    for part in tiling.parts:
        part.backward(operands, grads)
    return tuple(x[..., :dim].to(query.dtype) for x in grads[1:])  # type: ignore[return-value]


def _readable(tensor: Tensor) -> Tensor:
    """As a dense kernel reads it: rows of neighbouring elements, each at a place of its own."""
    by_row, by_dim = tensor.stride()[2:]
    return tensor if by_dim == 1 and by_row >= tensor.shape[3] else tensor.contiguous()


class Tiled(torch.autograd.Function):
    """`(query, key, value, mask, scale) -> (out, lse)`, heads-first, differentiable in query, key and value."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        return forward(query, key, value, mask, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.mask, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, None
            grad_out = torch.zeros_like(out)
        return *backward(grad_out, grad_lse, query, key, value, out, lse, ctx.mask, ctx.scale), None, None
