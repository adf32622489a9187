"""Runs on strips of a grid: on planes and in space, where the keys of a box of queries do not follow each other.

The grid is cut along every axis but the first into strips, which are copied one behind the other; in a strip, the rows
that a box sees follow each other, and boxes along the first axis are tiles of a run, read from overlapping views. So
of the overlap of boxes, that along the first axis is not copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from . import runs
from .intervals import Stretch
from .runs import Grads, Lanes, Operands, Run
from .scores import Placed

#: Bytes of strips that are copied at a time.
STRIPS_BYTES = 8 << 20

#: (first point, distance of strips, number of strips, width of a strip) on one axis.
Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class Strips:
    """A part of a cut mask on a grid of `extents`, of which every `steps[a]`-th point from `starts[a]` on counts.

    `across` are the strips of each axis but the first, of one width and with one mask; `runs` what is done on each
    strip, whose tokens are the rows of the first axis, one behind the other.
    """

    extents: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    across: tuple[Stretch, ...]
    runs: tuple[Run, ...]
    strip_bytes: int | None = None  #: in place of STRIPS_BYTES

    def forward(self, operands: Operands) -> None:
        """Fills in `out` and `lse` of `[batch, heads, seqlen, dim]` operands."""
        for query_places, key_places, heads, part in self.cuts(operands):
            query, key, value, out, lse = part
            strips = _strips(query, query_places)
            lanes = Lanes(
                _lanes(strips),
                _lanes(_strips(key, key_places)),
                _lanes(_strips(value, key_places)),
                _lanes(torch.empty_like(strips, dtype=out.dtype, memory_format=torch.contiguous_format)),
                torch.empty(_lanes_shape(strips)[:2], dtype=lse.dtype, device=lse.device),
                operands.scale,
                self.scores_of(operands, query_places, key_places, heads),
            )
            runs.forward(self.runs, lanes)
            _strips(out, query_places).copy_(lanes.out.view(strips.shape))
            to_lse = _strips(lse, query_places)
            to_lse.copy_(lanes.lse.view(to_lse.shape))

    def backward(self, operands: Operands, grads: Grads) -> None:
        """Adds to the gradients."""
        for query_places, key_places, heads, part in self.cuts(operands, grads):
            query, key, value, out, lse, grad_out, grad_query, grad_key, grad_value = part
            queries, keys = ([_strips(x, query_places) for x in (query, out, lse, grad_out)], _strips(key, key_places))
            lanes = Lanes(
                _lanes(queries[0]),
                _lanes(keys),
                _lanes(_strips(value, key_places)),
                _lanes(queries[1]),
                _lanes(queries[2]).squeeze(-1),
                operands.scale,
                self.scores_of(operands, query_places, key_places, heads),
            )
            wide = grad_query.dtype
            given = Grads(
                _lanes(queries[3]),
                torch.zeros(lanes.query.shape, dtype=wide, device=query.device),
                torch.zeros(lanes.key.shape, dtype=wide, device=query.device),
                torch.zeros(lanes.key.shape, dtype=wide, device=query.device),
            )
            runs.backward(self.runs, lanes, given)
            _strips(grad_query, query_places).add_(given.query.view(queries[0].shape))
            _add(grad_key, key_places, given.key.view(keys.shape))
            _add(grad_value, key_places, given.value.view(keys.shape))

    def tables(self) -> int:
        return sum(run.mask.nbytes for run in self.runs if isinstance(run.mask, Tensor))

    def scores_of(
        self, operands: Operands, q: list[Place], k: list[Place], heads: tuple[range, range]
    ) -> Placed | None:
        if operands.scores is None:
            return None
        tokens = self._grid(torch.arange(operands.query.shape[2], device=operands.query.device)[None, None, :, None])
        q_tokens, k_tokens = (_lanes(_strips(tokens, places)).squeeze(-1) for places in (q, k))
        return operands.scores.on_grid(q_tokens, k_tokens, self.extents, *heads)

    def cuts(
        self, operands: Operands, grads: Grads | None = None
    ) -> Iterator[tuple[list[Place], list[Place], tuple[range, range], list[Tensor]]]:
        """Places of queries and of keys, batch entries and heads, and the grids of these: so many strips at a time as
        fit the bound."""
        query, key, value, out, lse = operands[:5]
        of_queries, of_keys = [query, out, lse.unsqueeze(-1)], [key, value]
        if grads is not None:
            of_queries, of_keys = [*of_queries, grads.out, grads.query], [*of_keys, grads.key, grads.value]
        of_queries, of_keys = [self._grid(x) for x in of_queries], [self._grid(x) for x in of_keys]
        batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
        rows = of_keys[0].shape[2]
        a_head = rows * prod(stretch.columns for stretch in self.across) * query.shape[3] * query.element_size()
        a_head *= 2 if grads is None else 4
        counts = [stretch.count for stretch in self.across]
        bound = self.strip_bytes or STRIPS_BYTES
        # As many strips of the first axis that is cut as fit, for all heads; where not even one does, fewer heads.
        some = max(1, bound // (a_head * batch * kv_heads * prod(counts[1:])))
        entries = batch if a_head * batch * kv_heads <= bound else 1
        at_once = kv_heads if a_head * entries * kv_heads <= bound else 1
        group = heads // kv_heads
        for first, b, h in itertools.product(
            range(0, counts[0], some), range(0, batch, entries), range(0, kv_heads, at_once)
        ):
            head, *others = self.across
            count = min(some, counts[0] - first)
            query_places = [(head.q0 + first * head.rows, head.rows, count, head.rows)]
            key_places = [(head.k0 + first * head.k_step, head.k_step, count, head.columns)]
            query_places += [(other.q0, other.rows, other.count, other.rows) for other in others]
            key_places += [(other.k0, other.k_step, other.count, other.columns) for other in others]
            some_queries = [x[b : b + entries, h * group : (h + at_once) * group] for x in of_queries]
            some_keys = [x[b : b + entries, h : h + at_once] for x in of_keys]
            query, out, lse = some_queries[:3]
            key, value = some_keys[:2]
            which = range(b, b + entries), range(h * group, (h + at_once) * group)
            yield query_places, key_places, which, [query, key, value, out, lse, *some_queries[3:], *some_keys[2:]]

    def _grid(self, tensor: Tensor) -> Tensor:
        """`[batch, heads, *extents, dim]`, of the points that count; a view."""
        grid: Tensor = tensor.unflatten(2, self.extents)  # type: ignore[no-untyped-call]
        for axis, (start, step) in enumerate(zip(self.starts, self.steps)):
            if step != 1:
                grid = grid[(slice(None),) * (2 + axis) + (slice(start, None, step),)]
        return grid


def _strips(grid: Tensor, places: list[Place]) -> Tensor:
    """`[*strips, batch, heads, rows, *widths, dim]`, a view; without the dim of the LSE, which is 1, where it is."""
    batch, heads, rows, *axes, dim = grid.stride()
    sizes = [count for _, _, count, _ in places]
    strides = [step * stride for (_, step, _, _), stride in zip(places, axes)]
    sizes += [*grid.shape[:3], *(width for *_, width in places), grid.shape[-1]]
    strides += [batch, heads, rows, *axes, dim]
    offset = sum(first * stride for (first, *_), stride in zip(places, axes))
    return grid.as_strided(sizes, strides, grid.storage_offset() + offset)


def _lanes_shape(strips: Tensor) -> tuple[int, int, int]:
    axes = (strips.ndim - 4) // 2
    return prod(strips.shape[: axes + 2]), prod(strips.shape[axes + 2 : -1]), strips.shape[-1]


def _lanes(strips: Tensor) -> Tensor:
    """`[lanes, tokens, dim]`, a copy unless it is contiguous."""
    return strips.reshape(_lanes_shape(strips))


def _add(grid: Tensor, places: list[Place], grad: Tensor) -> None:
    """Adds gradients of strips, in parts of them that do not overlap."""
    axes = len(places)
    for parts in itertools.product(*(_parts(place) for place in places)):
        found = grad
        for axis, (strip, column, (_, _, count, width)) in enumerate(parts):
            found = found.narrow(axis, strip, count).narrow(axes + 3 + axis, column, width)
        _strips(grid, [place for *_, place in parts]).add_(found)


def _parts(place: Place) -> list[tuple[int, int, Place]]:
    """(first strip, first column, where they are) of parts of strips on one axis that do not overlap."""
    first, step, count, width = place
    if count == 1:
        return [(0, 0, place)]
    if step == 0:
        return [(strip, 0, (first, 0, 1, width)) for strip in range(count)]
    return [(0, column, (first + column, step, count, min(step, width - column))) for column in range(0, width, step)]
