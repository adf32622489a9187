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
from typing import NamedTuple

import torch
from torch import Tensor

from . import runs
from .intervals import Stretch
from .runs import Grads, Lanes, Operands, Rule, Run
from .scores import Placed

#: Bytes of strips that are copied at a time.
STRIPS_BYTES = 8 << 20

#: (first point, distance of strips, number of strips, width of a strip) on one axis.
Place = tuple[int, int, int, int]
#: Strips on each axis but the first. Those of one axis follow each other, and have the same rows and columns.
Across = tuple[tuple[Stretch, ...], ...]


class Block(NamedTuple):
    """Strips that lie at even distances on every axis: which they are on each, and where their keys are."""

    which: tuple[slice, ...]
    places: list[Place]


class Cut(NamedTuple):
    """The strips, batch entries and heads that are copied at a time."""

    counts: tuple[int, ...]  #: of strips on each axis but the first
    first: int  #: of the strips on the first of these
    queries: list[Place]
    keys: list[Block]
    entries: range
    heads: range


@dataclass(frozen=True)
class Strips:
    """A part of a cut mask on a grid of `extents`, of which every `steps[a]`-th point from `starts[a]` on counts.

    `across` are the strips of each axis but the first; `runs` what is done on each strip, whose tokens are the rows of
    the first axis, one behind the other; each query is in one of them. A mask of a run is that of all strips, or has
    one lane for each.
    """

    extents: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    across: Across
    runs: tuple[Run, ...]
    strip_bytes: int | None = None  #: in place of STRIPS_BYTES

    def forward(self, operands: Operands) -> None:
        """Fills in `out` and `lse` of `[batch, heads, seqlen, dim]` operands."""
        for cut, part in self.cuts(operands):
            query, key, value, out, lse = part
            strips = _strips(query, cut.queries)
            lanes = Lanes(
                _lanes(strips),
                _gathered(key, cut),
                _gathered(value, cut),
                _lanes(torch.empty_like(strips, dtype=out.dtype, memory_format=torch.contiguous_format)),
                torch.empty(_lanes_shape(strips)[:2], dtype=lse.dtype, device=lse.device),
                operands.scale,
                self.scores_of(operands, cut),
            )
            runs.forward(self._runs_of(cut), lanes)
            _strips(out, cut.queries).copy_(lanes.out.view(strips.shape))
            to_lse = _strips(lse, cut.queries)
            to_lse.copy_(lanes.lse.view(to_lse.shape))

    def backward(self, operands: Operands, grads: Grads) -> None:
        """Adds to the gradients."""
        for cut, part in self.cuts(operands, grads):
            query, key, value, out, lse, grad_out, grad_query, grad_key, grad_value = part
            queries = [_strips(x, cut.queries) for x in (query, out, lse, grad_out)]
            lanes = Lanes(
                _lanes(queries[0]),
                _gathered(key, cut),
                _gathered(value, cut),
                _lanes(queries[1]),
                _lanes(queries[2]).squeeze(-1),
                operands.scale,
                self.scores_of(operands, cut),
            )
            wide = grad_query.dtype
            # Where several runs have a query, they add to its gradient.
            to_fill = torch.zeros if any(run.more for run in self.runs) else torch.empty
            given = Grads(
                _lanes(queries[3]),
                to_fill(lanes.query.shape, dtype=wide, device=query.device),
                torch.zeros(lanes.key.shape, dtype=wide, device=query.device),
                torch.zeros(lanes.key.shape, dtype=wide, device=query.device),
            )
            runs.backward(self._runs_of(cut), lanes, given)
            _strips(grad_query, cut.queries).copy_(given.query.view(queries[0].shape))
            for grad, found in ((grad_key, given.key), (grad_value, given.value)):
                of_strips = found.view(*cut.counts, -1, *found.shape[1:])
                for block in cut.keys:
                    view = _strips(grad, block.places)
                    _add(grad, block.places, of_strips[block.which].reshape(view.shape))

    def tables(self) -> int:
        return sum(run.mask.nbytes for run in self.runs if isinstance(run.mask, Tensor))

    def scores_of(self, operands: Operands, cut: Cut) -> Placed | None:
        if operands.scores is None:
            return None
        tokens = self._grid(torch.arange(operands.query.shape[2], device=operands.query.device)[None, None, :, None])
        q_tokens, k_tokens = _lanes(_strips(tokens, cut.queries)), _gathered(tokens, cut)
        entries, heads = cut.entries, cut.heads
        return operands.scores.on_grid(q_tokens.squeeze(-1), k_tokens.squeeze(-1), self.extents, entries, heads)

    def cuts(self, operands: Operands, grads: Grads | None = None) -> Iterator[tuple[Cut, list[Tensor]]]:
        """Cuts, with the grids of their batch entries and heads: so many strips at a time as fit the bound."""
        query, key, value, out, lse = operands[:5]
        of_queries, of_keys = [query, out, lse.unsqueeze(-1)], [key, value]
        if grads is not None:
            of_queries, of_keys = [*of_queries, grads.out, grads.query], [*of_keys, grads.key, grads.value]
        of_queries, of_keys = [self._grid(x) for x in of_queries], [self._grid(x) for x in of_keys]
        batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
        rows = of_keys[0].shape[2]
        a_head = rows * prod(axis[0].columns for axis in self.across) * query.shape[3] * query.element_size()
        a_head *= 2 if grads is None else 4
        total, *others = self.counts
        bound = self.strip_bytes or STRIPS_BYTES
        # As many strips of the first axis that is cut as fit, for all heads; where not even one does, fewer heads.
        some = max(1, bound // (a_head * batch * kv_heads * prod(others)))
        entries = batch if a_head * batch * kv_heads <= bound else 1
        at_once = kv_heads if a_head * entries * kv_heads <= bound else 1
        group = heads // kv_heads
        for first, b, h in itertools.product(
            range(0, total, some), range(0, batch, entries), range(0, kv_heads, at_once)
        ):
            counts = (min(some, total - first), *others)
            firsts = (first, *(0 for _ in others))
            blocks = itertools.product(*map(_keys, self.across, firsts, counts))
            cut = Cut(
                counts,
                first,
                [_queries(*axis) for axis in zip(self.across, firsts, counts)],
                [Block(tuple(which for which, _ in block), [place for _, place in block]) for block in blocks],
                range(b, b + entries),
                range(h * group, (h + at_once) * group),
            )
            some_queries = [x[b : b + entries, h * group : (h + at_once) * group] for x in of_queries]
            some_keys = [x[b : b + entries, h : h + at_once] for x in of_keys]
            yield cut, [some_queries[0], *some_keys[:2], *some_queries[1:], *some_keys[2:]]

    @property
    def counts(self) -> tuple[int, ...]:
        """Of the strips, on each axis but the first."""
        return tuple(sum(stretch.count for stretch in axis) for axis in self.across)

    def _runs_of(self, cut: Cut) -> tuple[Run, ...]:
        """With the masks of its lanes."""
        return tuple(run._replace(mask=self._mask(run.mask, cut)) for run in self.runs)

    def _mask(self, mask: Tensor | Rule | None, cut: Cut) -> Tensor | Rule | None:
        if not isinstance(mask, Tensor) or mask.shape[1] == 1:
            return mask
        first, count = prod(cut.counts[1:]) * cut.first, prod(cut.counts)
        return mask[:, first : first + count].repeat_interleave(len(cut.entries) * len(cut.heads), 1)

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


def _queries(axis: tuple[Stretch, ...], first: int, count: int) -> Place:
    """Where the queries of strips `[first, first + count)` of an axis are."""
    rows = axis[0].rows
    return axis[0].q0 + first * rows, rows, count, rows


def _keys(axis: tuple[Stretch, ...], first: int, count: int) -> list[tuple[slice, Place]]:
    """Which of the strips `[first, first + count)` of an axis lie at even distances, and where their keys are."""
    found, at = [], 0
    for stretch in axis:
        begin, end = max(first, at), min(first + count, at + stretch.count)
        if begin < end:
            place = stretch.k0 + (begin - at) * stretch.k_step, stretch.k_step, end - begin, stretch.columns
            found.append((slice(begin - first, end - first), place))
        at += stretch.count
    return found


def _gathered(grid: Tensor, cut: Cut) -> Tensor:
    """The keys of all strips, `[lanes, tokens, dim]`."""
    if len(cut.keys) == 1:
        return _lanes(_strips(grid, cut.keys[0].places))
    views = [_strips(grid, block.places) for block in cut.keys]
    axes = len(cut.counts)
    found = torch.empty((*cut.counts, *views[0].shape[axes:]), dtype=grid.dtype, device=grid.device)
    for block, view in zip(cut.keys, views):
        found[block.which].copy_(view)
    return _lanes(found)


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
