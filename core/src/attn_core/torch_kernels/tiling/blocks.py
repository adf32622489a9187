"""Any mask, by what it answers: a block of queries reads the keys in its `span`, less the parts that `tile` calls
empty; what `tile` calls full needs no mask; the rest gets one by `keep`.

Blocks that look alike and move along in step are one run, with one mask where all have the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...bias import Mask
from .runs import Run
from .windows import additive

#: Queries of a block, and keys of the parts of its span that are asked for.
ROWS = 64
COLUMNS = 256
#: Elements of masks that are made beforehand, all together; beyond that, they are made when they are needed.
KEPT = 4 << 20


class Piece(NamedTuple):
    """Some keys of a block: `[k0, k0 + columns)`."""

    k0: int
    columns: int
    full: bool


class Block(NamedTuple):
    q0: int
    rows: int
    pieces: tuple[Piece, ...]

    def looks_like(self, other: Block) -> bool:
        same = self.rows == other.rows and len(self.pieces) == len(other.pieces)
        return same and all(a[1:] == b[1:] for a, b in zip(self.pieces, other.pieces))


class Kept(NamedTuple):
    """The masks of tiles by the rule of a mask; of one batch entry, and for each head where they differ."""

    mask: Mask
    batch: int
    like: Tensor

    def of(self, run: Run) -> Tensor:
        return additive(self.keep(run), self.like)

    def keep(self, run: Run) -> Tensor:
        """`[count, 1 or heads, rows, columns]`"""
        device, heads = self.like.device, self.mask.batch_and_heads[1]
        tiles = torch.arange(run.count, device=device)[:, None, None, None]
        q = run.q0 + tiles * run.q_step + torch.arange(run.rows, device=device)[:, None]
        k = run.k0 + tiles * run.k_step + torch.arange(run.columns, device=device)
        b = torch.full((1, 1, 1, 1), self.batch, device=device)
        kept = self.mask.keep(b, torch.arange(heads, device=device)[:, None, None], q, k)
        return kept.expand(run.count, heads, run.rows, run.columns)


def block_runs(mask: Mask, batch: int, like: Tensor) -> list[Run]:
    """Runs for batch entry `batch` of a mask."""
    found, elements = [], 0
    for run, full in _in_step(list(_blocks(mask))):
        if not full:
            heads = mask.batch_and_heads[1]
            kept = Kept(mask, batch, like)
            elements += run.count * heads * run.rows * run.columns
            run = run._replace(empty_rows=True, mask=kept)
            if elements <= KEPT:
                run = _with_mask(run, kept)
        found.append(run)
    return found


def _with_mask(run: Run, rule: Kept) -> Run:
    """The run with its mask made; one for all tiles where they have the same."""
    keep = rule.keep(run)
    if bool((keep == keep[:1]).all()):
        keep = keep[:1]
    return run._replace(mask=additive(keep, rule.like), empty_rows=not bool(keep.any(-1).all()))


def _blocks(mask: Mask) -> Iterator[Block]:
    seqlen_q = mask.bound_lengths()[0]
    for q0 in range(0, seqlen_q, ROWS):
        q1 = min(q0 + ROWS, seqlen_q)
        pieces = tuple(_pieces(mask, q0, q1))
        if pieces:
            yield Block(q0, q1 - q0, pieces)


def _pieces(mask: Mask, q0: int, q1: int) -> list[Piece]:
    """The keys of some queries: those that some of them see, apart from those that all of them see."""
    low, high = mask.span(q0, q1)
    found: list[Piece] = []
    for k0 in range(low, high, COLUMNS):
        k1 = min(k0 + COLUMNS, high)
        kind = mask.tile(q0, q1, k0, k1)
        if kind == "empty":
            continue
        full = kind == "full"
        if found and found[-1].full == full and found[-1].k0 + found[-1].columns == k0:
            found[-1] = Piece(found[-1].k0, k1 - found[-1].k0, full)
        else:
            found.append(Piece(k0, k1 - k0, full))
    if len(found) > 1 and 2 * sum(piece.columns for piece in found if piece.full) < high - low:
        # One problem with a mask is cheaper than several whose results are joined, where little is full or empty.
        seen = sum(piece.columns for piece in found)
        end = found[-1].k0 + found[-1].columns
        if 2 * seen >= end - found[0].k0:
            return [Piece(found[0].k0, end - found[0].k0, False)]
    return found


def _in_step(blocks: list[Block]) -> Iterator[tuple[Run, bool]]:
    """(run, whether all of its pairs remain) for blocks that look alike and lie at even distances."""
    begin = 0
    for i in range(1, len(blocks) + 1):
        if i < len(blocks) and blocks[i].looks_like(blocks[i - 1]) and _even(blocks, begin, i):
            continue
        first, count = blocks[begin], i - begin
        follows = blocks[begin + 1] if count > 1 else first
        for piece, next_piece in zip(first.pieces, follows.pieces):
            run = Run(
                first.q0,
                piece.k0,
                first.rows,
                piece.columns,
                count,
                follows.q0 - first.q0,
                next_piece.k0 - piece.k0,
                more=len(first.pieces) > 1,
            )
            yield run, piece.full
        begin = i


def _even(blocks: list[Block], begin: int, i: int) -> bool:
    """Whether block `i` follows the one before as the second of its run follows the first, not backwards."""
    pair, first = (blocks[i - 1], blocks[i]), (blocks[begin], blocks[begin + 1])
    steps, wanted = (
        (two.q0 - one.q0, *(b.k0 - a.k0 for a, b in zip(one.pieces, two.pieces))) for one, two in (pair, first)
    )
    return steps == wanted and min(steps) >= 0
