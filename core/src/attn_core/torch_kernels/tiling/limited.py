"""Runs for scores: each tile has a block of numbers of its own, so tiles must be small."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from .runs import MASKED, Diagonal, Run

#: Elements of the block of one tile, where it has more than the fewest queries.
ELEMENTS = 1 << 20
FEWEST, MOST = 32, 256


def limited(run: Run, like: Tensor, diagonal: int | None = None) -> Iterator[Run]:
    """The same in tiles of few queries, none of them causal: what is masked is said by their masks.

    With a `diagonal`, that key of query 0, what lies beside it is apart from what lies on it.
    """
    small = run.rows <= MOST and (run.rows <= FEWEST or run.rows * run.columns <= ELEMENTS)
    if small and not run.causal:
        yield run
        return
    corner = None if diagonal is None else run.q0 + diagonal - run.k0
    if corner is not None and (corner == 0 if run.causal else run.mask is None):
        yield from _beside(run, like, corner)
        return
    rows = max(FEWEST, min(MOST, ELEMENTS // max(1, run.columns) // FEWEST * FEWEST))
    if not run.causal and run.count == 1 and run.mask is None:  # one run, and what is left of it
        whole = run.rows // rows
        if whole:
            yield run._replace(rows=rows, count=whole, q_step=rows)
        if run.rows % rows:
            yield run._replace(q0=run.q0 + whole * rows, rows=run.rows % rows)
        return
    for first in range(0, run.rows, rows):
        part = run._replace(q0=run.q0 + first, rows=min(rows, run.rows - first))
        if run.causal:
            columns = min(run.columns, first + part.rows)
            part = part._replace(columns=columns, causal=False)
            if first < columns - 1:
                part = part._replace(mask=Diagonal(first, like))
        elif isinstance(run.mask, Tensor):
            part = part._replace(mask=run.mask[:, :, first : first + rows])
        yield part


def _beside(run: Run, like: Tensor, corner: int) -> Iterator[Run]:
    """Tiles on the diagonal, which starts at column `corner`, and those on either side of it."""
    cut = [(first, min(MOST, run.rows - first)) for first in range(0, run.rows, MOST)]
    pieces = [list(_pieces(run, corner, first, rows)) for first, rows in cut]
    more = run.more or any(len(some) > 1 for some in pieces)
    on: list[Run] = []
    for (first, rows), some in zip(cut, pieces):
        for begin, columns, crossed in some:
            tile = run._replace(q0=run.q0 + first, rows=rows, k0=run.k0 + begin, columns=columns, more=more)
            if crossed:
                on.append(tile)
            else:
                yield tile._replace(causal=False)
    for tile in _in_step(on):
        yield tile._replace(causal=False, mask=_triangle(tile.rows, tile.columns, like)) if run.causal else tile


def _pieces(run: Run, corner: int, first: int, rows: int) -> Iterator[tuple[int, int, bool]]:
    """(first column, columns, whether the diagonal crosses them) of some queries."""
    low, high = (min(max(0, corner + row), run.columns) for row in (first, first + rows))
    end = high if run.causal else run.columns
    for begin, stop, crossed in ((0, low, False), (low, high, True), (high, end, False)):
        if begin < stop:
            yield begin, stop - begin, crossed


def _in_step(tiles: list[Run]) -> Iterator[Run]:
    """Those of one shape that follow each other, where each is alone, in one run."""
    for _, alike in groupby(tiles, key=lambda tile: (tile.rows, tile.columns)):
        found = list(alike)
        step = found[1].q0 - found[0].q0 if len(found) > 1 else 0
        if step and found[0].count == 1 and found[1].k0 - found[0].k0 == step:
            yield found[0]._replace(count=len(found), q_step=step, k_step=step)
        else:
            yield from found


def _triangle(rows: int, columns: int, like: Tensor) -> Tensor:
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=like.device).triu(1)
    return torch.zeros(1, 1, rows, columns, dtype=like.dtype, device=like.device).masked_fill_(hidden, MASKED)
