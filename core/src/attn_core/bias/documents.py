"""Where the documents of a packed sequence lie, and which keys each of their queries sees.

Forced by two facts:
- There may be thousands, and a choice is looked up at every call. So they are kept as bytes, whose hash Python keeps
  and which compare by one memcmp; the same bytes are one constant, with one guard, where a graph is traced.
- The first and the last key that a query sees do not move back from one query to the next, in a document and from
  one to the next. So a block of queries is answered by its first and its last, each found by bisection.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracing import constant
from .diagonal import CORNERS, Corner, clipped_pairs, offset

#: Of a causal mask or a window: keys before the diagonal, keys behind it, and where it starts. None is no limit.
Band = tuple["int | None", "int | None", "Corner | None"]

WHOLE: Band = (None, None, None)


class Documents(NamedTuple):
    """Document n has the queries `[q[n], q[n + 1])` and the keys `[k0[n], k1[n])`."""

    q: list[int]
    k0: list[int]
    k1: list[int]

    def sizes(self) -> list[tuple[int, int]]:
        """(queries, keys) of each."""
        return [(self.q[n + 1] - self.q[n], self.k1[n] - self.k0[n]) for n in range(len(self.k0))]


def pack(seqlens_q: Sequence[int], seqlens_kv: Sequence[int], starts_kv: Sequence[int] | None) -> bytes:
    """The bytes of documents of these lengths; their keys follow each other where no `starts_kv` are given."""
    starts = [0, *accumulate(seqlens_kv)][:-1] if starts_kv is None else starts_kv
    return array("q", [*seqlens_q, *seqlens_kv, *starts]).tobytes()


@lru_cache(maxsize=64)
def unpack(packed: bytes) -> Documents:
    """What `pack` was given."""
    numbers = array("q", packed)
    count = len(numbers) // 3
    starts = numbers[2 * count :].tolist()
    ends = [start + size for start, size in zip(starts, numbers[count : 2 * count])]
    return Documents([0, *accumulate(numbers[:count])], starts, ends)


class Row(NamedTuple):
    """Of one document: the queries `[first, end)` that see a key at all, and what they see.

    Query i sees the keys `[max(k0, i + low), min(k1, i + high))`.
    """

    first: int
    end: int
    k0: int
    k1: int
    low: int
    high: int

    def first_key(self, query: int) -> int:
        return max(self.k0, query + self.low)

    def end_key(self, query: int) -> int:
        return min(self.k1, query + self.high)


class Rows:
    """What the queries of documents see, each through the same band on its document's own diagonal."""

    def __init__(self, documents: Documents, band: Band) -> None:
        left, right, corner = band
        self.rows: list[Row] = []
        for q0, q1, k0, k1 in zip(documents.q, documents.q[1:], documents.k0, documents.k1):
            diagonal = k0 - q0 + offset(corner, q1 - q0, k1 - k0)
            low = k0 - q1 if left is None else diagonal - left
            high = k1 - q0 if right is None else diagonal + right + 1
            first, end = max(q0, k0 - high + 1), min(q1, k1 - low)
            if first < end and k0 < k1:
                self.rows.append(Row(first, end, k0, k1, low, high))
        self.firsts = [row.first for row in self.rows]
        self.ends = [row.end for row in self.rows]
        self.last_keys = [row.end_key(row.end - 1) for row in self.rows]
        counts = Counter(documents.sizes())
        self.pairs = sum(count * pairs_of(size, band) for size, count in counts.items())

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        """The first key that a query of `[q0, q1)` sees, and the one behind the last."""
        first, last = bisect_right(self.ends, q0), bisect_left(self.firsts, q1) - 1
        if first > last:
            return 0, 0
        return (
            self.rows[first].first_key(max(q0, self.firsts[first])),
            self.rows[last].end_key(min(q1, self.ends[last]) - 1),
        )

    def any(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        """Whether a query of `[q0, q1)` sees a key of `[k0, k1)`."""
        # The first query that sees a key behind k0 sees the first keys of all that do.
        place = max(bisect_right(self.ends, q0), bisect_right(self.last_keys, k0))
        if place == len(self.rows):
            return False
        row = self.rows[place]
        query = max(q0, row.first, k0 - row.high + 1)
        return query < min(q1, row.end) and row.first_key(query) < k1

    def all(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        """Whether every query of `[q0, q1)` sees every key of `[k0, k1)`, of which there is one."""
        place = bisect_right(self.ends, q0)
        if place == len(self.rows):
            return False
        row = self.rows[place]
        queries = row.first <= q0 and q1 <= row.end
        return queries and row.first_key(q1 - 1) <= k0 and k1 <= row.end_key(q0)


def pairs_of(size: tuple[int, int], band: Band) -> float:
    """How many pairs one document of that size has within the band."""
    (seqlen_q, seqlen_kv), (left, right, corner) = size, band
    diagonal = offset(corner, seqlen_q, seqlen_kv)
    upto = seqlen_q * seqlen_kv if right is None else clipped_pairs(seqlen_q, seqlen_kv, diagonal + right)
    before = 0.0 if left is None else clipped_pairs(seqlen_q, seqlen_kv, diagonal - left - 1)
    return upto - before


@lru_cache(maxsize=64)
def rows_of(packed: bytes, band: Band) -> Rows:
    return Rows(unpack(packed), band)


def without_empty(packed: bytes) -> bytes:
    """The same without the documents that have neither queries nor keys."""
    documents = unpack(packed)
    if all(map(any, documents.sizes())):
        return packed
    left = [(*size, start) for size, start in zip(documents.sizes(), documents.k0) if any(size)]
    seqlens_q, seqlens_kv, starts = zip(*left) if left else ((), (), ())
    return pack(seqlens_q, seqlens_kv, starts)


def common_band(
    documents: Documents, bands: list[Band], diagonal: int | None = None, corners: tuple[Corner, ...] = CORNERS
) -> Band | None:
    """The simplest band that, in each document, leaves what all `bands` leave; None where no band does.

    The first of `bands` lies on each document's own diagonal. So do the others, or, where `diagonal` is given, on one
    that goes through the whole sequence: it is the key that query 0 has there. The result starts at one of `corners`.
    """
    left_of: list[list[int]] = []  # seqlen_q, seqlen_kv, and the lowest and the highest k - i that are left
    for q0, q1, k0, k1 in zip(documents.q, documents.q[1:], documents.k0, documents.k1):
        low, high = q0 - q1 + 1, k1 - k0 - 1
        for place, (left, right, corner) in enumerate(bands):
            across = place > 0 and diagonal is not None
            centre = diagonal + q0 - k0 if across else offset(corner, q1 - q0, k1 - k0)  # type: ignore[operator]
            low = low if left is None else max(low, centre - left)
            high = high if right is None else min(high, centre + right)
        if q0 < q1 and k0 < k1:
            left_of.append([q1 - q0, k1 - k0, low, high])
    found: list[Band] = []
    for corner in corners:
        before, behind = [], []
        for seqlen_q, seqlen_kv, low, high in left_of:
            centre, first, last = offset(corner, seqlen_q, seqlen_kv), 1 - seqlen_q, seqlen_kv - 1
            before.append((centre - low, low > first, centre - first))
            behind.append((high - centre, high < last, last - centre))
        left, right = _one_limit(before), _one_limit(behind)
        if left != NO_LIMIT and right != NO_LIMIT:
            found.append(WHOLE if left is None and right is None else (left, right, corner))
    # More kernels know causal than a window: which is one with the other corner, where the lengths differ everywhere.
    return next((band for band in found if band[:2] == (None, 0)), found[0] if found else None)


#: No number of keys is the same limit in every document.
NO_LIMIT = -1


def _one_limit(limits: list[tuple[int, bool, int]]) -> int | None:
    """The keys beside the diagonal that are the limit of every document: None for no limit, else NO_LIMIT.

    Of each: (its limit, whether that cuts anything off, the least that does not).
    """
    found = {limit for limit, cuts, _ in limits if cuts}
    if not found:
        return None
    limit = max(found)
    if len(found) > 1 or limit < 0 or any(limit < enough for _, cuts, enough in limits if not cuts):
        return NO_LIMIT
    return limit


@constant
def numbers(packed: bytes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each document its queries, its keys, and the first of them."""
    every = array("q", packed)
    count = len(every) // 3
    return tuple(every[:count]), tuple(every[count : 2 * count]), tuple(every[2 * count :])


def key_ranges(numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], band: Band) -> Tensor:
    """int32 `[2, seqlen_q]`, on the CPU: the first key that each query sees, and the one behind the last."""
    left, right, corner = band
    seqlens_q, seqlens_kv, starts = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    diagonal = starts - (seqlens_q.cumsum(0) - seqlens_q)
    if corner == "bottom-right":
        diagonal = diagonal + seqlens_kv - seqlens_q
    seqlen_q = sum(numbers[0])
    of_queries = torch.stack((starts, starts + seqlens_kv, diagonal))
    first, end, diagonal = of_queries.repeat_interleave(seqlens_q, dim=1, output_size=seqlen_q)
    diagonal = diagonal + torch.arange(seqlen_q, device="cpu")
    low = first if left is None else torch.minimum(torch.maximum(first, diagonal - left), end)
    high = end if right is None else torch.maximum(torch.minimum(end, diagonal + right + 1), low)
    return torch.stack((low, high)).to(torch.int32)
