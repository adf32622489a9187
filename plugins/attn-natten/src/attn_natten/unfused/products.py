"""The three products of neighborhood attention, by small dense matrix products.

    weights   attn[q, slot] = query[q] . key[k]                 k is the key in that slot of q
    average   out[q] = sum over slots of attn[q, slot] * value[k]
    spread    out[k] = sum over the slots that k is in of attn[q, slot] * rows[q]

Each is linear in both operands, and the derivatives of any are the others. In a block a few queries meet all keys that
one of them sees: a dense product of which `weights` keeps the slots, and which the others begin with zeros. What they
make on the way is bounded; sums have one order, so results are the same from run to run.

Grids are `[batch, heads, *spatial, dim]`, attn `[batch, heads, *spatial, width]`; any strides. No gradients: see `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .parts import Part, parts, pieces

#: Elements of the blocks that are made at a time.
BLOCKS = 1 << 20


class Window(NamedTuple):
    """Parameters of a neighborhood, one for each axis."""

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @classmethod
    def of(cls, kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]) -> Window:
        return cls(tuple(kernel_size), tuple(dilation), tuple(is_causal))

    @property
    def width(self) -> int:
        return prod(self.kernel)

    def parts(self, grid: Tensor) -> tuple[Part, ...]:
        return parts(tuple(grid.shape[2:-1]), *self, grid.shape[-1])


def weights(query: Tensor, key: Tensor, window: Window, masked: float) -> Tensor:
    """`attn`, with `masked` in the slots without a key."""
    attn = query.new_empty((*query.shape[:-1], window.width))
    if not attn.numel():
        return attn
    dtype = _dtype(query)
    for part in window.parts(query):
        queries, keys = part.queries(query), part.keys(key)
        of_queries = part.queries(attn)
        slots = of_queries.unflatten(-1, window.kernel)
        for piece in _pieces(part, queries):
            some = queries[piece]
            pairs = torch.bmm(_matrices(some, part.rows, dtype), _matrices(keys[piece], part.columns, dtype).mT)
            kept = part.slots(pairs, window.kernel)
            slots[piece].copy_(kept.unflatten(0, some.shape[: _leading(part)]))
        mask = part.mask(window.kernel, query.device)
        if mask is not None:
            of_queries.masked_fill_(mask, masked)
    return attn


def average(attn: Tensor, value: Tensor, window: Window) -> Tensor:
    """What is in a slot without a key does not matter. `attn` and `value` have one dtype."""
    return _weighted(attn, window, value, None)[0]


def spread(attn: Tensor, rows: Tensor, window: Window) -> Tensor:
    """What is in a slot without a key does not matter. `attn` and `rows` have one dtype."""
    return _weighted(attn, window, None, rows)[1]


def average_and_spread(attn: Tensor, value: Tensor, rows: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Both at once: the blocks of `attn` are made once."""
    return _weighted(attn, window, value, rows)


def _weighted(attn: Tensor, window: Window, value: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    like = value if value is not None else rows
    assert like is not None
    dtype = _dtype(attn)
    averages = torch.empty_like(like, memory_format=torch.contiguous_format) if value is not None else like
    # Several blocks add to a key, so it is rounded to half precision once, at the end.
    sums = torch.zeros(like.shape, dtype=wide(attn), device=like.device) if rows is not None else like
    if not like.numel():
        return averages, sums.to(like.dtype)
    for part in window.parts(like):
        of_queries = part.queries(attn)
        slots = of_queries.unflatten(-1, window.kernel)
        mask = part.mask(window.kernel, attn.device)
        if mask is not None:
            mask = mask.unflatten(-1, window.kernel)
        shape = of_queries.shape[: _leading(part)]
        most = min(prod(shape), _most(part))
        # Where a query does not see a key, zeros stay from piece to piece.
        pairs = torch.zeros(most, part.rows * part.columns, dtype=dtype, device=attn.device)
        values, outs = (None, None) if value is None else (part.keys(value), part.queries(averages))
        of_rows, strips = (None, []) if rows is None else (part.queries(rows), list(part.strips(sums)))
        for piece in pieces(shape, most):
            some = slots[piece]
            if mask is not None:
                some = some.masked_fill(mask, 0)
            leading = some.shape[: _leading(part)]
            block = pairs[: prod(leading)]
            part.slots(block, window.kernel).unflatten(0, leading).copy_(some)
            block = block.view(-1, part.rows, part.columns)
            if values is not None and outs is not None:
                out = outs[piece]
                out.copy_(torch.bmm(block, _matrices(values[piece], part.columns, dtype)).view(out.shape))
            if of_rows is not None:
                added = torch.bmm(block.mT, _matrices(of_rows[piece], part.rows, dtype))
                added = added.view(*leading, *(run.columns for run in part.runs), -1)
                for strip, columns in strips:
                    strip[piece].add_(added[columns])
    return averages, sums.to(like.dtype)


def _pieces(part: Part, view: Tensor):  # type: ignore[no-untyped-def]
    return pieces(view.shape[: _leading(part)], _most(part))


def _most(part: Part) -> int:
    """Blocks that are made at a time."""
    return max(1, BLOCKS // (part.rows * part.columns))


def _leading(part: Part) -> int:
    """Dimensions of the views of a part before those within a block."""
    return 2 + 2 * part.rank


def _matrices(view: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`[blocks, rows, dim]`, contiguous."""
    copy = torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)
    return copy.view(-1, rows, view.shape[-1])


def _dtype(tensor: Tensor) -> torch.dtype:
    """In which matrices are multiplied: many CPUs have no fast products in half precision."""
    return wide(tensor) if tensor.device.type == "cpu" else tensor.dtype


def wide(tensor: Tensor) -> torch.dtype:
    """In which many are added up."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
