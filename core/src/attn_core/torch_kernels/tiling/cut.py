"""Which way a mask is cut."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from ...bias import Causal, Mask, Neighborhood, Segments
from .blocks import block_runs
from .boxes import parts_of
from .chosen import OWN, Tiles
from .documents import document_runs
from .intervals import intervals
from .limited import limited
from .runs import Run
from .scores import Scores
from .sequence import Sequence
from .tables import TABLES, Part, Tiling
from .windows import causal_runs, interval_runs

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def whole(seqlen_q: int, seqlen_kv: int) -> Tiling:
    """That of no mask: one tile."""
    return of_runs([Run(0, 0, seqlen_q, seqlen_kv)], seqlen_q)


def tiling(
    mask: Mask | None,
    query: Tensor,
    seqlen_kv: int,
    backward: bool,
    scores: Scores | None,
    chosen: Tiles = OWN,
) -> Tiling:
    """The tiling of a mask, or of none."""
    if mask is not None:
        return tiling_of(mask, query, backward, scores, chosen)
    one = whole(query.shape[2], seqlen_kv)
    return one if scores is None else for_scores(one, like_of(query), scores.diagonal)


def tiling_of(mask: Mask, query: Tensor, backward: bool, scores: Scores | None = None, chosen: Tiles = OWN) -> Tiling:
    """The tiling of `mask`, for the forward or the backward; kept where the mask holds no data.

    With `scores`, something is added to the logits of each tile, so that tiles are small. What is `chosen` is for
    neighborhoods.
    """
    like = like_of(query)
    if type(mask) is not Neighborhood:
        chosen = OWN
    small = None if scores is None else (scores.diagonal,)

    def made() -> Tiling:
        found = cut(mask, backward, like, chosen, joined=scores is None)
        return found if small is None else for_scores(found, like, *small)

    key = mask.key, backward, small, like.dtype, like.device, None if chosen is OWN else chosen
    return made() if mask.holds_data else TABLES.get(key, made)


def like_of(query: Tensor) -> Tensor:
    """Dtype and device of what is added to the logits."""
    return torch.empty(0, dtype=WIDE.get(query.dtype, query.dtype), device=query.device)


def for_scores(found: Tiling, like: Tensor, diagonal: int | None) -> Tiling:
    """The same in small tiles, on either side of that diagonal where the scores have one."""
    parts: list[Part] = []
    for part in found.parts:
        # In strips, and on every n-th token, a diagonal is another one.
        along = diagonal if isinstance(part, Sequence) and part.step == 1 else None
        runs = tuple(small for run in part.runs for small in limited(run, like, along))  # type: ignore[attr-defined]
        parts.append(replace(part, runs=runs))  # type: ignore[type-var]
    if any(run.more for part in parts for run in part.runs):  # type: ignore[attr-defined]
        return Tiling(tuple(parts), covers=False, joins=True)
    return replace(found, parts=tuple(parts))


def cut(mask: Mask, backward: bool, like: Tensor, chosen: Tiles = OWN, *, joined: bool = True) -> Tiling:
    """The tiles of `mask`, their masks as `like` in dtype and device; `joined` as in `parts_of`."""
    seqlen_q = mask.bound_lengths()[0]
    if type(mask) is Neighborhood:
        return Tiling(tuple(parts_of(mask, backward, like, chosen, joined=joined)), covers=True, joins=False)
    if type(mask) is Causal:
        return of_runs(causal_runs(mask), seqlen_q)
    if type(mask) is Segments:
        return of_runs(document_runs(mask, backward, like), seqlen_q)
    ranges = intervals(mask)
    if ranges is not None:
        return of_runs(interval_runs(*ranges, backward, like), seqlen_q)
    batch, heads = mask.batch_and_heads
    if batch == 1:
        return of_runs(block_runs(mask, 0, like), seqlen_q, apart=heads != 1)
    each = [of_runs(block_runs(mask, entry, like), seqlen_q, batch=entry) for entry in range(batch)]
    covers, joins = all(tiling.covers for tiling in each), any(tiling.joins for tiling in each)
    return Tiling(tuple(part for tiling in each for part in tiling.parts), covers, joins)


def of_runs(runs: SequenceOf[Run], seqlen_q: int, batch: int | None = None, apart: bool = False) -> Tiling:
    """One sequence of these runs."""
    first = sum(run.rows * run.count for run in runs if not run.more)
    joins = any(run.more for run in runs)
    return Tiling((Sequence(tuple(runs), batch=batch, apart=apart),), first == seqlen_q, joins)
