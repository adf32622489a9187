"""The rows of a block mask as bits, so that what may be skipped is told by a few operations on ints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Of each row of blocks its columns as bits, column 0 the lowest: True in any batch entry and head, in all of them;
    and the same of those that are seen whole."""

    seen: list[int]
    seen_in_all: list[int]
    whole: list[int]
    whole_in_all: list[int]

    def within(self, first: int, end: int) -> Rows:
        """Those of the rows `[first, end)`."""
        return Rows(*(rows[first:end] for rows in self))

    def columns(self) -> tuple[int, int]:
        """(seen, whole) in any of the rows."""
        return _union(self.seen), _union(self.whole)


def rows_of(blocks: Tensor, full: Tensor | None) -> Rows:
    """The rows of `blocks`, of which those in `full` are seen whole; waits for their device."""
    flat = _stacked(blocks)
    whole = torch.zeros_like(flat[:1])
    if full is not None:
        both = blocks & full
        whole = _stacked(both)
    return Rows(_bits(flat.any(0)), _bits(flat.all(0)), _bits(whole.any(0)), _bits(whole.all(0)))


def _stacked(blocks: Tensor) -> Tensor:
    """`[batch * num_heads, blocks_q, blocks_kv]`; where there are none of these, reshape could not tell of how many."""
    return blocks[None].flatten(0, -3)


def has_all(rows: list[int], columns: int) -> bool:
    """Whether every row has all of these columns."""
    return all(row & columns == columns for row in rows)


def _union(rows: list[int]) -> int:
    columns = 0
    for row in rows:
        columns |= row
    return columns


def _bits(table: Tensor) -> list[int]:
    digits = table.flip(1).to("cpu", torch.uint8) + ord("0")
    return [int(bytes(row) or b"0", 2) for row in digits.tolist()]
