"""Where the sequences of a batch lie: in rows of equal length, packed behind one another, or in pages.

An index `at` takes the sequence out of a tensor that is `[batch, seqlen, …]` or `[total, …]`, as a view, so that what
is written into it is written into the tensor.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

At: TypeAlias = "tuple[slice] | tuple[int, slice]"


def at(entry: int, offsets: list[int] | None, seqlen: int, skipped: int = 0) -> At:
    """The index of one sequence: of batch entry `entry`, or of what lies behind `offsets[entry]`."""
    if offsets is None:
        return (entry, slice(skipped, skipped + seqlen))
    return (slice(offsets[entry] + skipped, offsets[entry] + skipped + seqlen),)


def lse_at(index: At) -> tuple[int | slice, ...]:
    """The index of the same sequence in an LSE: `[batch, num_heads, seqlen]` or `[num_heads, total]`."""
    return (index[0], slice(None), index[1]) if len(index) == 2 else (slice(None), index[0])


def in_pages(pages: Tensor, table: Tensor, entry: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The index of the keys from `start` to `stop` of one sequence in `[num_pages, page_size, …]`: page and row.

    An entry of the table that is no page reads memory that is not the cache's; here that raises what CUDA raises at
    best.
    """
    num_pages, page_size = pages.shape[:2]
    key = torch.arange(start, stop)
    page = table[entry].long()[: -(-stop // page_size)]
    if stop > table.shape[1] * page_size or bool(((page < 0) | (page >= num_pages)).any()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return page[key // page_size], key % page_size


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that nobody has written: NaN, so that what reads it shows."""
    return torch.full(shape, float("nan"), dtype=dtype)
