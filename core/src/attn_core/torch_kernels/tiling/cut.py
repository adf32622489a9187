"""Which way a mask is cut."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from ...bias import Mask, Neighborhood
from .boxes import parts_of
from .intervals import intervals
from .runs import Run
from .sequence import Sequence
from .tables import TABLES, Tiling
from .windows import band_runs

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def tiling_of(mask: Mask, query: Tensor, backward: bool) -> Tiling:
    """The tiling of `mask`, for the forward or the backward; kept where the mask holds no data."""
    like = torch.empty(0, dtype=WIDE.get(query.dtype, query.dtype), device=query.device)
    if mask.holds_data:
        return cut(mask, backward, like)
    return TABLES.get((mask.key, backward, like.dtype, like.device), lambda: cut(mask, backward, like))


def cut(mask: Mask, backward: bool, like: Tensor) -> Tiling:
    """The tiles of `mask`, their masks as `like` in dtype and device."""
    seqlen_q = mask.bound_lengths()[0]
    if type(mask) is Neighborhood:
        return Tiling(tuple(parts_of(mask, backward, like)), covers=True, joins=False)
    ranges = intervals(mask)
    if ranges is not None:
        return tiling_of_runs(band_runs(mask, *ranges, backward, like), seqlen_q)
    raise NotImplementedError


def tiling_of_runs(runs: SequenceOf[Run], seqlen_q: int) -> Tiling:
    """One sequence of these runs."""
    first = sum(run.rows * run.count for run in runs if not run.more)
    joins = any(run.more for run in runs)
    return Tiling((Sequence(tuple(runs)),), first == seqlen_q, joins)
