"""Packed documents: each is a problem of its own, on the queries and keys from here to there.

Documents of the same lengths that follow each other are one run. The padding between them is in none.
"""

from __future__ import annotations

from torch import Tensor

from ...bias import Causal, Segments
from .intervals import intervals
from .runs import Run
from .windows import causal_runs, interval_runs

Sizes = tuple[int, int]


def document_runs(mask: Segments, backward: bool, like: Tensor) -> list[Run]:
    """Runs of all documents."""
    of_sizes: dict[Sizes, list[Run]] = {}
    found: list[Run] = []
    alike: list[tuple[int, int]] = []  # (q0, k0) of documents that follow each other, of the same lengths
    sizes: Sizes = (0, 0)

    def finish() -> None:
        if alike and 0 not in sizes:
            if sizes not in of_sizes:
                of_sizes[sizes] = _runs_within(mask, sizes, backward, like)
            found.extend(_repeated(of_sizes[sizes], alike, sizes))

    for q0, q1, k0, k1 in mask.documents():
        if (q1 - q0, k1 - k0) != sizes or k0 != alike[-1][1] + sizes[1]:
            finish()
            alike, sizes = [], (q1 - q0, k1 - k0)
        alike.append((q0, k0))
    finish()
    return found


def _repeated(runs: list[Run], starts: list[tuple[int, int]], sizes: Sizes) -> list[Run]:
    """The runs of one document, for each of those that start here."""
    if all(run.count == 1 for run in runs):
        q0, k0 = starts[0]
        return [
            run._replace(q0=q0 + run.q0, k0=k0 + run.k0, count=len(starts), q_step=sizes[0], k_step=sizes[1])
            for run in runs
        ]
    return [run._replace(q0=q0 + run.q0, k0=k0 + run.k0) for q0, k0 in starts for run in runs]


def _runs_within(mask: Segments, sizes: Sizes, backward: bool, like: Tensor) -> list[Run]:
    """Runs of one document of these lengths, as if it were alone."""
    within = None if mask.within is None else mask.within.bind(*sizes).normalize()
    if within is None:
        return [Run(0, 0, *sizes)]
    if isinstance(within, Causal):
        return causal_runs(within)
    ranges = intervals(within)
    assert ranges is not None  # a window
    return interval_runs(*ranges, backward, like)
