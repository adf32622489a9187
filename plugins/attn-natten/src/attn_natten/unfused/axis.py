"""One axis of a neighborhood, cut into runs: blocks of queries at even distances, and the keys that each block sees.

With a dilation, the points at that distance are *lines* of their own, on which there is none. On a line the window of
a query rests at the borders and slides between them:

    kernel_size=3    ███····   rests: the queries of the run see the same keys      one block
                     ███····
                     ·███···   slides: the window of the next query is one further
                     ··███··                                                        blocks of `rows` queries
                     ···███·
                     ····███   rests                                                one block
                     ····███

Nothing is padded, and within a run all places are those of a strided view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Lines(NamedTuple):
    """`count` lines of `points` points; they begin at `first`, `first + 1`, ..."""

    first: int
    count: int  # type: ignore[assignment]  # not tuple's
    points: int


class Run(NamedTuple):
    """Block i has the queries `[q0 + i * rows, ... + rows)` and sees the keys `[k0 + i * rows, ... + columns)`.

    Slot t of row a of a block is column `a + t` where the window slides, else column t. Where `masked`, the axis is
    causal and q0 is 0: the slots `t > a` have no key.
    """

    q0: int
    rows: int
    count: int  # type: ignore[assignment]
    k0: int
    columns: int
    slides: bool = False
    masked: bool = False


def lines(extent: int, dilation: int) -> tuple[Lines, ...]:
    """The lines of an axis, those of equal length together."""
    points, longer = divmod(extent, dilation)
    if not longer:
        return (Lines(0, dilation, points),)
    return Lines(0, longer, points + 1), Lines(longer, dilation - longer, points)


def runs(points: int, kernel: int, causal: bool, rows: int) -> tuple[Run, ...]:
    """The runs of a line; each query is in one. `rows` is for the blocks of sliding windows."""
    return tuple(_runs(points, kernel, causal, rows))


def _runs(points: int, kernel: int, causal: bool, rows: int) -> Iterator[Run]:
    before = kernel - 1 if causal else kernel // 2  # keys of a sliding window before its query
    last = points - kernel  # where the last window starts
    if last == 0:
        yield Run(0, points, 1, 0, kernel, masked=causal)
        return
    first, end = before, before + last + 1  # these have windows of their own; the outermost two may go with those
    rows = min(rows, end - first)
    rest = (end - first) % rows  # that rest
    if rest:
        first += 1
    if rest > 1 and end < points:
        end -= 1
    yield Run(0, first, 1, 0, kernel, masked=causal)
    blocks, rest = divmod(end - first, rows)
    if blocks:
        yield Run(first, rows, blocks, first - before, rows + kernel - 1, slides=True)
    if rest:
        first += blocks * rows
        yield Run(first, rest, 1, first - before, rest + kernel - 1, slides=True)
    if end < points:
        yield Run(end, points - end, 1, last, kernel)
