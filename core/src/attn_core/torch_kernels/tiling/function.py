"""Tiled attention as one differentiable function of heads-first operands, a mask, a scale and scores.

The backward computes the weights anew from the LSE, as FlashAttention does. A gradient to the LSE is one more column:
see `flash_lse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...bias import Mask
from .chosen import OWN, Chosen, Tiles
from .cut import WIDE, like_of, tiling
from .runs import MASKED, Grads, Operands
from .scores import Added, Gradients, Scores

#: Columns that are added to say the LSE's gradient: one is needed, and a row stays aligned.
COLUMNS = 8


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    scale: float,
    scores: Scores | None = None,
    held: Sequence[Tensor] = (),
    chosen: Tiles = OWN,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `scale` is above 0, and `held` what the scores hold."""
    wide = WIDE.get(query.dtype, query.dtype)
    if _has_no_data(query):  # a mask may not be cut without numbers, and there is nothing to compute
        return torch.empty_like(query), torch.empty(query.shape[:3], dtype=wide, device=query.device)
    tiles = tiling(mask, query, key.shape[2], False, scores, chosen)
    dtype = wide if tiles.joins else query.dtype  # what is joined is rounded once
    lse_shape = query.shape[:3]
    if tiles.covers and not tiles.joins:
        out = torch.empty_like(query, dtype=dtype)
        lse = torch.empty(lse_shape, dtype=wide, device=query.device)
    else:
        out = torch.zeros_like(query, dtype=dtype)
        lse = torch.full(lse_shape, MASKED, dtype=wide, device=query.device)
    added = None if scores is None else Added(scores.of(held), query.shape[1], like_of(query), None, scores.diagonal)
    operands = Operands(_readable(query), _readable(key), _readable(value), out, lse, scale, added)
    for part in tiles.parts:
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
    scores: Scores | None = None,
    held: Sequence[Tensor] = (),
    wanted: Sequence[bool] = (),
    chosen: Tiles = OWN,
) -> tuple[Tensor, ...]:
    """Gradients to query, key and value, as `empty_like` makes them, and to what is `wanted` of `held`."""
    if _has_no_data(query):
        wanted_of_held = [tensor for tensor, want in zip(held, wanted) if want]
        return tuple(map(torch.empty_like, (query, key, value, *wanted_of_held)))
    tiles = tiling(mask, query, key.shape[2], True, scores, chosen)
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
    gradients, added = Gradients(held, wanted, like_of(query)) if any(wanted) else None, None
    if scores is not None:
        holding = scores.of(held if gradients is None else gradients.leaves)
        added = Added(holding, query.shape[1], like_of(query), gradients, scores.diagonal)
    given_operands = Operands._make((*map(_readable, operands), _readable(out), lse, scale, added))
    for part in tiles.parts:
        part.backward(given_operands, grads)
    query, key, value = (
        made if made.shape == x.shape and made.dtype is x.dtype else torch.empty_like(x).copy_(made[..., : x.shape[3]])
        for made, x in zip(grads[1:], given)
    )
    return query, key, value, *(() if gradients is None else gradients.results())


def _has_no_data(tensor: Tensor) -> bool:
    """Whether it is on the meta device, or a fake tensor of another."""
    return tensor.is_meta or getattr(tensor, "fake_mode", None) is not None


def _readable(tensor: Tensor) -> Tensor:
    """As a dense kernel reads it: rows of neighbouring elements, each at a place of its own."""
    by_row, by_dim = tensor.stride()[2:]
    return tensor if by_dim == 1 and by_row >= tensor.shape[3] else tensor.contiguous()


class Tiled(torch.autograd.Function):
    """`(query, key, value, mask, scale, scores, chosen, *held) -> (out, lse)`, heads-first, differentiable in query,
    key, value and what the scores hold."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
        scale: float,
        scores: Scores | None,
        chosen: Chosen | None,
        *held: Tensor,
    ) -> tuple[Tensor, Tensor]:
        tiles = OWN if chosen is None else chosen.forward
        return forward(query, key, value, mask, scale, scores, held, tiles)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.mask, ctx.scale, ctx.scores, ctx.chosen, *held = inputs
        ctx.save_for_backward(query, key, value, *output, *held)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *held = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wanted = tuple(ctx.needs_input_grad[7:])
        tiles = OWN if ctx.chosen is None else ctx.chosen.backward
        operands = grad_out, grad_lse, query, key, value, out, lse, ctx.mask, ctx.scale, ctx.scores, wanted, tiles
        to_query, to_key, to_value, *rest = TiledBackward.apply(*operands, *held)  # type: ignore[no-untyped-call]
        to_held = [rest.pop(0) if want else None for want in wanted]
        return to_query, to_key, to_value, None, None, None, None, *to_held

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> Any:
        results = _over_samples(Tiled, info.batch_size, in_dims, operands, operands[3], operands[5])
        return results, (0,) * len(results)


class TiledBackward(torch.autograd.Function):
    """The backward, as a function of its own, so that vmap finds what to do with it."""

    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor, ...]:
        *given, wanted, tiles = operands[:12]
        return backward(*(*given, operands[12:], wanted, tiles))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("torch/tiled: cannot be differentiated twice")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> Any:
        results = _over_samples(TiledBackward, info.batch_size, in_dims, operands, operands[7], operands[9])
        return results, (0,) * len(results)


def _over_samples(
    function: Any, size: int, in_dims: Any, operands: tuple[Any, ...], mask: Mask | None, scores: Scores | None
) -> tuple[Tensor, ...]:
    """`function` of each of `size` samples: they are more batch entries, or one by one where the bias counts those or
    holds tensors, which may be other ones for each sample."""
    stacked = [
        x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(operands, in_dims)
    ]
    counts = mask is not None and mask.batch_and_heads[0] != 1
    if not counts and (scores is None or (scores.batch == 1 and not scores.held())):
        folded = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in stacked]
        return tuple(x.unflatten(0, (size, -1)) for x in function.apply(*folded))
    each = [function.apply(*(x[i] if isinstance(x, Tensor) else x for x in stacked)) for i in range(size)]
    return tuple(torch.stack(results) for results in zip(*each))
