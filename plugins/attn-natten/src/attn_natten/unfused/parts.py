"""A grid of 1 to 3 axes, cut into parts: a run on each axis, for lines of equal length on each axis.

The blocks of a part have one shape, so they are batches of small dense matrices: `rows` queries by `columns` keys, of
which a query uses the `width` in its window. Operands are read, and results written, through strided views: here they
are `[batch, heads, *lines, *blocks, *in_block, dim]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axis import Lines, Run, lines, runs

#: Queries of a block on an axis.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)

# What the choice of blocks costs, in nanoseconds of one core. Only the ratios matter, and not much.
PAIR = 0.5  #: an element of a block, written and read
PAIR_DIM = 0.03  #: a multiplication and addition
KEY_DIM = 0.3  #: an element of a key, copied to its block
BLOCK = 2200.0  #: a block's matrix product begun
PART = 8000.0  #: the calls for one part, for each head: a few dozen microseconds for some heads


class Part:
    """A run on each axis, for lines of equal length on each axis.

    Attributes: `rows` queries of a block see `columns` keys; `blocks` is `[*lines, *blocks]`, and `leading` how many
    dimensions a view has before those within a block.
    """

    def __init__(self, lines: tuple[Lines, ...], runs: tuple[Run, ...], dilation: tuple[int, ...]) -> None:
        self.lines, self.runs, self.dilation = lines, runs, dilation
        self.rows_by_axis = tuple(run.rows for run in runs)
        self.columns_by_axis = tuple(run.columns for run in runs)
        self.rows, self.columns = prod(self.rows_by_axis), prod(self.columns_by_axis)
        self.blocks = (*(line.count for line in lines), *(run.count for run in runs))
        self.leading = 2 + len(self.blocks)
        self._first_query = tuple(run.q0 for run in runs)
        self._first_key = tuple(run.k0 for run in runs)
        self._strips = tuple(self._cut())
        self._steps = self._steps_in_block()

    def queries(self, grid: Tensor) -> Tensor:
        """`[batch, heads, *lines, *blocks, *rows, dim]`, a view of `[batch, heads, *spatial, dim]`."""
        return self._view(grid, self._first_query, self.rows_by_axis)

    def keys(self, grid: Tensor) -> Tensor:
        """`[batch, heads, *lines, *blocks, *columns, dim]`, an overlapping view: not to be written to."""
        return self._view(grid, self._first_key, self.columns_by_axis)

    def strips(self, grid: Tensor) -> list[tuple[Tensor, Any]]:
        """The columns in strips that overlap with none of another block: a view to write to, and the index of those
        columns in `[..., *columns, dim]`."""
        return [(self._view(grid, first, sizes), index) for first, sizes, index in self._strips]

    def _cut(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Any]]:
        """(first keys, numbers of columns, index of the columns) of each strip."""
        by_axis = []
        for run in self.runs:
            step = run.rows if run.count > 1 else run.columns  # blocks are `rows` apart
            starts = range(0, run.columns, step)
            by_axis.append([slice(start, min(start + step, run.columns)) for start in starts])
        for strip in itertools.product(*by_axis):
            first = tuple(run.k0 + cut.start for run, cut in zip(self.runs, strip))
            yield first, tuple(cut.stop - cut.start for cut in strip), (..., *strip, slice(None))

    def _view(self, grid: Tensor, first: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """`first`: where the points of the first block begin on their line, and `sizes`, how many they are."""
        strides, offset = _places(self, first, grid.stride())
        shape = (*grid.shape[:2], *self.blocks, *sizes, grid.shape[-1])
        return grid.as_strided(shape, strides, grid.storage_offset() + offset)

    def slots(self, pairs: Tensor, kernel: Sequence[int]) -> Tensor:
        """`[blocks, *rows, *kernel]`, a view of the contiguous `pairs`, `[blocks, rows, columns]`: those that windows
        keep. No two are in one place."""
        return pairs.as_strided((pairs.shape[0], *self.rows_by_axis, *kernel), self._steps, pairs.storage_offset())

    def _steps_in_block(self) -> tuple[int, ...]:
        of_rows, of_slots = [], []
        row, column = self.rows * self.columns, self.columns
        for run in self.runs:
            row //= run.rows
            column //= run.columns
            of_rows.append(row + (column if run.slides else 0))
            of_slots.append(column)
        return (self.rows * self.columns, *of_rows, *of_slots)

    def mask(self, kernel: tuple[int, ...], device: torch.device) -> Tensor | None:
        """`[*rows, *kernel]`: True where a slot has no key; None where all have one."""
        if not any(run.masked for run in self.runs):
            return None
        return _mask(tuple((run.rows, run.masked) for run in self.runs), kernel, device)


@lru_cache(maxsize=4096)
def _places(part: Part, first: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(strides, offset) of a view of a grid with these strides."""
    batch, heads, *steps, last = strides
    apart, along, offset = [], [], 0
    for step, line, run, dilation, begin in zip(steps, part.lines, part.runs, part.dilation, first):
        step_on_line = dilation * step
        offset += line.first * step + begin * step_on_line
        apart.append(run.rows * step_on_line)
        along.append(step_on_line)
    return (batch, heads, *steps, *apart, *along, last), offset


@lru_cache(maxsize=256)
def _mask(rows: tuple[tuple[int, bool], ...], kernel: tuple[int, ...], device: torch.device) -> Tensor:
    rank = len(rows)
    whole = torch.zeros(*(count for count, _ in rows), *kernel, dtype=torch.bool, device=device)
    for axis, ((count, masked), width) in enumerate(zip(rows, kernel)):
        if masked:
            later = torch.arange(width, device=device) > torch.arange(count, device=device).unsqueeze(1)
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = count, width
            whole |= later.view(shape)
    return whole


@lru_cache(maxsize=1024)
def parts(
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    dim: int,
) -> tuple[Part, ...]:
    """The parts of a grid; each query is in one. Blocks are of the sizes that cost least for heads of `dim`."""
    of_lines = [lines(*axis) for axis in zip(spatial, dilation)]
    found = []
    for chosen in itertools.product(*of_lines):
        rows = block(tuple(line.points for line in chosen), kernel, causal, dim)
        of_runs = [runs(line.points, *axis) for line, axis in zip(chosen, zip(kernel, causal, rows))]
        found += [Part(chosen, each, dilation) for each in itertools.product(*of_runs)]
    return tuple(found)


def block(points: tuple[int, ...], kernel: tuple[int, ...], causal: tuple[bool, ...], dim: int) -> tuple[int, ...]:
    """Queries of a block on each axis."""
    choices = [_choices(*axis) for axis in zip(points, kernel, causal)]

    def cost(chosen: tuple[Choice, ...]) -> float:
        pairs, keys = prod(each.pairs for each in chosen), prod(each.keys for each in chosen)
        blocks, count = prod(each.blocks for each in chosen), prod(each.runs for each in chosen)
        return pairs * (PAIR + dim * PAIR_DIM) + keys * dim * KEY_DIM + blocks * BLOCK + count * PART

    return tuple(each.rows for each in min(itertools.product(*choices), key=cost))


class Choice(NamedTuple):
    """What a number of rows comes to on one axis."""

    rows: int
    pairs: int
    keys: int
    blocks: int
    runs: int


def _choices(points: int, kernel: int, causal: bool) -> list[Choice]:
    found = []
    for rows in ROWS:
        if rows > 1 and rows > points - kernel + 1:
            break
        cut = runs(points, kernel, causal, rows)
        found.append(
            Choice(
                rows,
                sum(run.count * run.rows * run.columns for run in cut),
                sum(run.count * run.columns for run in cut),
                sum(run.count for run in cut),
                len(cut),
            )
        )
    return found


def pieces(shape: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts the leading dimensions into pieces of at most `most` elements, at least one, in order."""
    whole, inner = len(shape), 1
    while whole and inner * shape[whole - 1] <= most:
        whole -= 1
        inner *= shape[whole]
    if not whole:
        yield ()
        return
    step = max(1, most // inner)
    for outer in itertools.product(*map(range, shape[: whole - 1])):
        for begin in range(0, shape[whole - 1], step):
            yield (*(slice(i, i + 1) for i in outer), slice(begin, begin + step))
