"""Masks whose queries see one range of keys each, cut into tiles.

A tile is `rows` queries that follow each other, and the keys from the first that one of them sees to the last.
Neighbouring tiles whose ranges move along in step are one run, with one mask: a sliding window is one run, and a few
tiles at either end of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...bias import Causal, Intersection, Mask, Window


class Stretch(NamedTuple):
    """Tiles along one axis; tile i has the queries `[q0 + i * rows, … + rows)` and the keys `[k0 + i * k_step, …)`."""

    q0: int
    rows: int
    k0: int
    columns: int
    count: int  # type: ignore[assignment]  # not tuple's
    k_step: int
    keep: Tensor | None  #: `[rows, columns]`, True = may attend; None: all of them

    @property
    def has_empty_rows(self) -> bool:
        return self.keep is not None and not bool(self.keep.any(-1).all())


def intervals(mask: Mask) -> tuple[Tensor, Tensor] | None:
    """`(first, end)`, int64 `[seqlen_q]` each: the keys that a query sees; equal where it sees none.

    None where the mask is not of such a kind.
    """
    seqlen_q, seqlen_kv = mask.bound_lengths()
    left: int | None = None
    right: int | None = 0
    if isinstance(mask, Intersection):
        parts = [intervals(part) for part in mask.parts]
        if any(part is None for part in parts):
            return None
        first = torch.stack([part[0] for part in parts if part is not None]).amax(0)
        end = torch.stack([part[1] for part in parts if part is not None]).amin(0)
        return first, torch.maximum(first, end)
    if type(mask) is Window:
        left, right = mask.left, mask.right
    elif type(mask) is not Causal:
        return None
    diagonal = torch.arange(seqlen_q, device="cpu") + mask.offset
    first = torch.zeros_like(diagonal) if left is None else (diagonal - left).clamp(0, seqlen_kv)
    end = torch.full_like(diagonal, seqlen_kv) if right is None else (diagonal + right + 1).clamp(0, seqlen_kv)
    return first, torch.maximum(first, end)


def stretches(first: Tensor, end: Tensor, rows: int) -> list[Stretch]:
    """Tiles of `rows` queries (the last one may have fewer) that see the keys `[first, end)`; those that see none are
    left out."""
    length = first.shape[0]
    whole = length // rows
    found = _of_equal_rows(first[: whole * rows].view(whole, rows), end[: whole * rows].view(whole, rows), 0)
    if whole * rows < length:
        found += _of_equal_rows(first[whole * rows :][None], end[whole * rows :][None], whole * rows)
    return found


def _of_equal_rows(first: Tensor, end: Tensor, q0: int) -> list[Stretch]:
    count, rows = first.shape
    if count == 0:
        return []
    empty = first >= end
    low = first.masked_fill(empty, torch.iinfo(torch.int64).max).amin(1)
    high = end.masked_fill(empty, 0).amax(1)
    low = torch.minimum(low, high)  # where no query sees a key
    first = (first - low[:, None]).masked_fill(empty, 0)
    end = (end - low[:, None]).masked_fill(empty, 0)
    alike = ((first[1:] == first[:-1]) & (end[1:] == end[:-1])).all(1).tolist()
    lows, widths = low.tolist(), (high - low).tolist()
    found: list[Stretch] = []
    begin = 0
    for tile in range(1, count + 1):
        in_step = tile < count and alike[tile - 1] and lows[tile] >= lows[tile - 1]
        if in_step and (tile == begin + 1 or lows[tile] - lows[tile - 1] == lows[begin + 1] - lows[begin]):
            continue
        if widths[begin]:
            columns = torch.arange(widths[begin], device="cpu")
            keep = (columns >= first[begin][:, None]) & (columns < end[begin][:, None])
            step = lows[begin + 1] - lows[begin] if tile - begin > 1 else 0
            full = bool(keep.all())
            at = q0 + begin * rows
            found.append(Stretch(at, rows, lows[begin], widths[begin], tile - begin, step, None if full else keep))
        begin = tile
    return found


def widened(stretch: Stretch, columns: int, length: int) -> Stretch:
    """The same tiles with more columns, of keys on an axis of `length`; what is read beside is masked."""
    last = stretch.k0 + (stretch.count - 1) * stretch.k_step
    before = max(0, last + columns - length)
    behind = columns - stretch.columns - before
    if before == behind == 0:
        return stretch
    assert before <= stretch.k0, f"{columns} columns do not fit on an axis of {length}"
    keep = stretch.keep
    if keep is None:
        keep = torch.ones(stretch.rows, stretch.columns, dtype=torch.bool, device="cpu")
    return stretch._replace(k0=stretch.k0 - before, columns=columns, keep=pad(keep, (before, behind)))
