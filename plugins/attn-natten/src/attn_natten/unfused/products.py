"""The three products of neighborhood attention, by small dense matrix products.

    weights   attn[q, slot] = query[q] . key[k]                          k is the key in that slot of q
    average   out[q] = sum over slots of attn[q, slot] * value[k]
    spread    out[k] = sum over the slots that k is in of attn[q, slot] * rows[q]

Each is linear in both operands, and the derivatives of any are the others. A block is a few queries by all keys that
one of them sees: `weights` keeps the slots of a dense product, the others put slots among zeros before theirs. What is
made on the way is bounded, and sums have one order, so results are the same from run to run.

Grids are `[batch, heads, *spatial, dim]`, attn `[batch, heads, *spatial, width]`; any strides. No gradients: see `ops`.
What is in a slot without a key does not matter. Both operands have one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .parts import Part, parts, pieces
from .scratch import Scratch, wide
from .shapes import apart

#: Elements of the blocks, with copies of their keys, that are made at a time: they should stay in a core's cache.
BLOCKS = 1 << 19

Piece = tuple[slice, ...]


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
    scratch = Scratch(query)
    for part in window.parts(query):
        queries, keys = part.queries(query), part.keys(key)
        slots = apart(part.queries(attn), -1, window.kernel)
        for piece in pieces(queries.shape[: part.leading], _most(part, query.shape[-1])):
            some = queries[piece]
            rows = scratch.matrices("rows", some, part.rows)
            columns = scratch.matrices("columns", keys[piece], part.columns)
            pairs = scratch.take("pairs", len(rows), part.rows, part.columns)
            torch.bmm(rows, columns.mT, out=pairs)
            kept = part.slots(pairs, window.kernel)
            slots[piece].copy_(apart(kept, 0, some.shape[: part.leading]))
        mask = part.mask(window.kernel, query.device)
        if mask is not None:
            slots.masked_fill_(mask, masked)
    return attn


def average(attn: Tensor, value: Tensor, window: Window) -> Tensor:
    averages = _Averages(value)
    _read(attn, window, value, averages)
    return averages.out


def spread(attn: Tensor, rows: Tensor, window: Window) -> Tensor:
    sums = _Sums(rows)
    _read(attn, window, rows, sums)
    return sums.out


def average_and_spread(attn: Tensor, value: Tensor, rows: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Both at once: the blocks of `attn` are made once."""
    averages, sums = _Averages(value), _Sums(rows)
    _read(attn, window, value, averages, sums)
    return averages.out, sums.out


class _Reader(Protocol):
    """Multiplies the blocks of `attn` by something."""

    def begin(self, part: Part) -> None: ...

    def read(self, block: Tensor, part: Part, piece: Piece, scratch: Scratch) -> None:
        """`block` is `[blocks, rows, columns]`, of a piece of the part."""


def _read(attn: Tensor, window: Window, grid: Tensor, *readers: _Reader) -> None:
    if not grid.numel():
        return
    scratch = Scratch(attn)
    for part in window.parts(grid):
        slots = apart(part.queries(attn), -1, window.kernel)
        mask = part.mask(window.kernel, attn.device)
        shape = slots.shape[: part.leading]
        most = min(prod(shape), _most(part, grid.shape[-1]))
        blocks = scratch.take("pairs", most, part.rows, part.columns)
        blocks.zero_()  # where a query does not see a key, zeros stay from piece to piece
        for reader in readers:
            reader.begin(part)
        for piece in pieces(shape, most):
            some = slots[piece] if mask is None else slots[piece].masked_fill(mask, 0)
            leading = some.shape[: part.leading]
            block = blocks[: prod(leading)]
            apart(part.slots(block, window.kernel), 0, leading).copy_(some)
            for reader in readers:
                reader.read(block, part, piece, scratch)


class _Averages:
    """For each query, of the values it sees."""

    def __init__(self, value: Tensor) -> None:
        self._value, self.out = value, torch.empty_like(value, memory_format=torch.contiguous_format)

    def begin(self, part: Part) -> None:
        self._values, self._outs = part.keys(self._value), part.queries(self.out)

    def read(self, block: Tensor, part: Part, piece: Piece, scratch: Scratch) -> None:
        values = scratch.matrices("columns", self._values[piece], part.columns)
        out = self._outs[piece]
        out.copy_(torch.bmm(block, values, out=scratch.take("products", *_product(block, values))).view(out.shape))


class _Sums:
    """For each key, of the rows of the queries that see it."""

    def __init__(self, rows: Tensor) -> None:
        # Several blocks add to a key: in half precision it is rounded once, at the end.
        self._rows, self._sums = rows, torch.zeros(rows.shape, dtype=wide(rows), device=rows.device)

    @property
    def out(self) -> Tensor:
        return self._sums.to(self._rows.dtype)

    def begin(self, part: Part) -> None:
        self._queries, self._strips = part.queries(self._rows), part.strips(self._sums)

    def read(self, block: Tensor, part: Part, piece: Piece, scratch: Scratch) -> None:
        queries = self._queries[piece]
        rows = scratch.matrices("rows", queries, part.rows)
        products = torch.bmm(block.mT, rows, out=scratch.take("products", *_product(block.mT, rows)))
        added = products.view(*queries.shape[: part.leading], *part.columns_by_axis, -1)
        for strip, columns in self._strips:
            strip[piece].add_(added[columns])


def _product(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    return a.shape[0], a.shape[1], b.shape[2]


def _most(part: Part, dim: int) -> int:
    """Blocks that are made at a time."""
    return max(1, BLOCKS // (part.columns * (part.rows + dim)))
