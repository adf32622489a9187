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
from .cut import WIDE, tiling_of, whole
from .runs import MASKED, Grads, Lanes

#: Columns that are added to say the LSE's gradient: one is needed, and a row stays aligned.
COLUMNS = 8


def forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `scale` is above 0."""
    tiling = whole(query.shape[2], key.shape[2]) if mask is None else tiling_of(mask, query, backward=False)
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
    mask: Mask | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, as `empty_like` makes them."""
    tiling = whole(query.shape[2], key.shape[2]) if mask is None else tiling_of(mask, query, backward=True)
    wide = WIDE.get(query.dtype, query.dtype)
    given = operands = query, key, value
    empty = lse == MASKED
    if grad_lse is not None:  # a row without keys has a constant LSE
        grad_lse = grad_lse.masked_fill(empty, 0.0).unsqueeze(-1).to(out.dtype)
        grad_out, out = pad(grad_out, (0, COLUMNS), value=1.0), torch.cat([out, -grad_lse], -1)
        out = pad(out, (0, COLUMNS - 1))
        operands = pad(query, (0, COLUMNS)), pad(key, (0, COLUMNS)), pad(value, (0, COLUMNS))
    lse = lse.masked_fill(empty, 0.0)
    grads = Grads(_readable(grad_out), *(torch.zeros_like(x, dtype=wide) for x in operands))
    lanes = Lanes._make((*map(_readable, operands), _readable(out), lse, scale))
    for part in tiling.parts:
        part.backward(lanes, grads)
    query, key, value = (
        made if made.shape == x.shape and made.dtype is x.dtype else torch.empty_like(x).copy_(made[..., : x.shape[3]])
        for made, x in zip(grads[1:], given)
    )
    return query, key, value


def _readable(tensor: Tensor) -> Tensor:
    """As a dense kernel reads it: rows of neighbouring elements, each at a place of its own."""
    by_row, by_dim = tensor.stride()[2:]
    return tensor if by_dim == 1 and by_row >= tensor.shape[3] else tensor.contiguous()


class Tiled(torch.autograd.Function):
    """`(query, key, value, mask, scale) -> (out, lse)`, heads-first, differentiable in query, key and value."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> tuple[Tensor, Tensor]:
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
            grad_out = torch.zeros_like(out)
        grads = TiledBackward.apply(grad_out, grad_lse, query, key, value, out, lse, ctx.mask, ctx.scale)  # type: ignore[no-untyped-call]
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> Any:
        return _over_samples(Tiled, info.batch_size, in_dims, operands), (0, 0)


class TiledBackward(torch.autograd.Function):
    """The backward, as a function of its own, so that vmap finds what to do with it."""

    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("torch/tiled: cannot be differentiated twice")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> Any:
        return _over_samples(TiledBackward, info.batch_size, in_dims, operands), (0, 0, 0)


def _over_samples(function: Any, size: int, in_dims: Any, operands: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`function` of each of `size` samples: they are more batch entries, or one by one where the mask counts those."""
    mask: Mask | None = operands[-2]
    stacked = [
        x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(operands, in_dims)
    ]
    if mask is None or mask.batch_and_heads[0] == 1:
        folded = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in stacked]
        return tuple(x.unflatten(0, (size, -1)) for x in function.apply(*folded))
    each = [function.apply(*(x[i] if isinstance(x, Tensor) else x for x in stacked)) for i in range(size)]
    return tuple(torch.stack(results) for results in zip(*each))
