"""Runs for scores: each tile has a block of numbers of its own, so tiles must be small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .runs import Diagonal, Run

#: Elements of the block of one tile, where it has more than the fewest queries.
ELEMENTS = 1 << 20
FEWEST, MOST = 32, 256


def limited(run: Run, like: Tensor) -> Iterator[Run]:
    """The same in tiles of few queries, none of them causal: what is masked is said by their masks."""
    small = run.rows <= MOST and (run.rows <= FEWEST or run.rows * run.columns <= ELEMENTS)
    if small and not run.causal:
        yield run
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
