"""Causal masks and windows, cut into runs of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bias import Causal
from .intervals import Stretch, stretches
from .runs import MASKED, Run

#: Queries of a tile. More of them mean fewer tiles and fewer additions of overlapping gradients; fewer mean less that
#: is read and masked. The backward pays for both ends, so that it depends on how many keys a query sees.
FORWARD_ROWS = 32
#: Where no tiles look alike, each costs a call and a mask of its own: then their full part goes without a mask, and
#: the rest, which does look alike, in other runs.
UNLIKE = 16
ROWS_OF_UNLIKE = 256


def causal_runs(mask: Causal) -> list[Run]:
    """One causal problem; with a corner at the bottom right, the keys that all queries see apart from it."""
    seqlen_q, seqlen_kv = mask.bound_lengths()
    q0, full = max(0, -mask.offset), max(0, mask.offset)  # queries without a key, keys that all of them see
    rows, columns = seqlen_q - q0, min(seqlen_kv - full, seqlen_q - q0)
    if not full:
        return [Run(q0, 0, rows, columns, causal=True)]
    return [Run(0, 0, rows, full), Run(0, full, rows, columns, causal=True, more=True)]


def interval_runs(first: Tensor, end: Tensor, backward: bool, like: Tensor, rows: int | None = None) -> list[Run]:
    """Runs for queries that see the keys `[first, end)`, int64 `[seqlen_q]` each; in tiles of `rows`, if given."""
    found = stretches(first, end, rows or rows_for(first, end, backward))
    if len(found) > UNLIKE and sum(stretch.count for stretch in found) < 4 * len(found):
        return _unlike(first, end, like)
    return [run_of(stretch, like) for stretch in found]


def rows_for(first: Tensor, end: Tensor, backward: bool) -> int:
    """Queries of a tile."""
    if not backward:
        return FORWARD_ROWS
    widest = int((end - first).amax()) if first.numel() else 0
    return min(max(32, widest // 8 // 32 * 32), 192)


def _unlike(first: Tensor, end: Tensor, like: Tensor) -> list[Run]:
    """Tiles in up to three parts: the keys that all of its queries see, and those before and behind that some see."""
    length = first.shape[0]
    tile = torch.arange(length, device="cpu") // ROWS_OF_UNLIKE
    tiles = -(-length // ROWS_OF_UNLIKE)
    low = torch.zeros(tiles, dtype=torch.int64).scatter_reduce(0, tile, first, "amax", include_self=False)[tile]
    high = torch.zeros(tiles, dtype=torch.int64).scatter_reduce(0, tile, end, "amin", include_self=False)[tile]
    high = torch.maximum(low, high)
    parts = (first, torch.minimum(low, end)), (low, high), (torch.maximum(high, first), end)
    return [
        run_of(stretch, like)._replace(more=True)
        for start, stop in parts
        for stretch in stretches(start, torch.maximum(start, stop), ROWS_OF_UNLIKE)
    ]


def run_of(stretch: Stretch, like: Tensor) -> Run:
    return Run(
        stretch.q0,
        stretch.k0,
        stretch.rows,
        stretch.columns,
        stretch.count,
        stretch.rows,
        stretch.k_step,
        mask=None if stretch.keep is None else additive(stretch.keep, like),
        empty_rows=stretch.has_empty_rows,
    )


def additive(keep: Tensor, like: Tensor) -> Tensor:
    """`[1 or tiles, 1 or heads, rows, columns]`: 0 where a key may be attended, else -inf."""
    mask = torch.zeros(keep.shape, dtype=like.dtype, device=keep.device).masked_fill_(~keep, MASKED).to(like.device)
    return mask[(None,) * (4 - mask.ndim)]
