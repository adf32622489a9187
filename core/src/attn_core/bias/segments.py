"""Segments: documents packed behind each other in one sequence (varlen); none sees another."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..tracing import constant
from .base import Mask, Rule, TileKind, _is_tracing, known
from .causal import Causal
from .document_lengths import lengths_between, packed_documents, plain_ints
from .documents import WHOLE, Band, common_band, key_ranges, numbers, rows_of, unpack, without_empty
from .window import Window

SHOWN = 12  #: so many documents are listed by repr, before and after the rest


@dataclass(frozen=True, repr=False, init=False)
class Segments(Mask):
    """Query i of document n sees the keys of document n, those that `within` lets it.

    Args:
        seqlens_q: queries of each document, ints >= 0; together they are seqlen_q.
        seqlens_kv: keys of each document; None: as many as it has queries.
        within: an unbound Causal or Window, which counts in each document from its own first query and key; None: all
            of its keys. Its corner may be left out where no document's lengths differ.
        starts_kv: the first key of each document; None: right behind the document before. With it, what lies between,
            and behind the last one, is padding: it may be anything, NaN too.

        Segments([2, 3])     Segments([2, 3], within=Causal())     Segments([2, 2], [2, 1], starts_kv=[0, 3])
        ██···                █····                                 ██··
        ██···                ██···                                 ██··
        ··███                ··█··                                 ···█
        ··███                ··██·                                 ···█
        ··███                ··███

    Raises InputTypeError for anything but integers, and InputError, naming the document, for lengths below 0, another
    number of documents, keys that overlap or a corner that is missing; when bound, for other lengths in all.
    """

    packed: bytes
    within: Causal | Window | None
    has_gaps: bool  #: keys may lie between the documents, or behind them, that belong to none
    lengths: tuple[int, int] | None = None
    key: tuple[object, ...] = field(init=False, compare=False)

    def __init__(
        self,
        seqlens_q: Sequence[int],
        seqlens_kv: Sequence[int] | None = None,
        *,
        within: Causal | Window | None = None,
        starts_kv: Sequence[int] | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        queries = plain_ints("seqlens_q", seqlens_q)
        keys = queries if seqlens_kv is None else plain_ints("seqlens_kv", seqlens_kv)
        starts = None if starts_kv is None else plain_ints("starts_kv", starts_kv)
        if within is not None and not isinstance(within, (Causal, Window)):
            raise InputTypeError(f"Segments: within takes Causal, Window or None, got {type(within).__name__}")
        if within is not None and within.lengths is not None:
            raise InputError(
                f"Segments: within must not be bound, as each document has its own lengths; got {within!r}"
            )
        self._set(
            packed_documents(queries, keys, starts, _kind(within), band_of(within)), within, starts is not None, lengths
        )

    def _set(self, packed: bytes, within: Causal | Window | None, has_gaps: bool, lengths: Any) -> None:
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "within", within)
        object.__setattr__(self, "has_gaps", has_gaps)
        object.__setattr__(self, "lengths", lengths)
        inner = None if within is None else within.key
        object.__setattr__(self, "key", (Segments, packed, inner, has_gaps, lengths))

    @classmethod
    def from_offsets(
        cls,
        offsets_q: Sequence[int] | Tensor,
        offsets_kv: Sequence[int] | Tensor | None = None,
        *,
        within: Causal | Window | None = None,
    ) -> Segments:
        """Documents by where they begin, and the last one ends: `[0, 5, 14, 18]` are `[5, 9, 4]` (cu_seqlens).

        A tensor is read once, which waits for its device; while a graph is traced it cannot be read. Raises InputError,
        naming the index, for offsets that decrease or do not begin at 0.
        """
        keys = None if offsets_kv is None else lengths_between("offsets_kv", offsets_kv)
        return cls(lengths_between("offsets_q", offsets_q), keys, within=within)

    def __repr__(self) -> str:
        queries, keys, starts = self.seqlens_q, self.seqlens_kv, self.starts_kv
        text = f"Segments({_shown(queries)}"
        if keys != queries:
            text += f", {_shown(keys)}"
        if self.within is not None:
            text += f", within={self.within!r}"
        if starts is not None:
            text += f", starts_kv={_shown(starts)}"
        return f"{text})" if self.lengths is None else f"{text}).bind{self.lengths}"

    # What it is made of

    @property
    def seqlens_q(self) -> tuple[int, ...]:
        """Queries of each document."""
        return tuple(queries for queries, _ in unpack(self.packed).sizes())

    @property
    def seqlens_kv(self) -> tuple[int, ...]:
        """Keys of each document."""
        return tuple(keys for _, keys in unpack(self.packed).sizes())

    @property
    def starts_kv(self) -> tuple[int, ...] | None:
        """The first key of each document; None where each begins right behind the one before."""
        return tuple(unpack(self.packed).k0) if self.has_gaps else None

    def documents(self) -> list[tuple[int, int, int, int]]:
        """(q0, q1, k0, k1) of each: its queries are `[q0, q1)` and its keys `[k0, k1)`, in order."""
        documents = unpack(self.packed)
        return list(zip(documents.q, documents.q[1:], documents.k0, documents.k1))

    def within_document(self, n: int) -> Causal | Window | None:
        """What `within` is in document n, bound to its lengths; None where all of its keys are seen."""
        if self.within is None:
            return None
        q0, q1, k0, k1 = self.documents()[n]
        return self.within.bind(q1 - q0, k1 - k0)

    # A value that may be bound

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Segments:
        self._check_rebind(seqlen_q, seqlen_kv)
        queries, end = totals(self.packed)
        for name, has, got in (("seqlen_q", queries, seqlen_q), ("seqlen_kv", end, seqlen_kv)):
            if name == "seqlen_kv" and self.has_gaps:
                if got < has:
                    raise InputError(f"bias: {self!r} has keys up to {has}, got seqlen_kv={got}")
            elif has != got:
                raise InputError(f"bias: the documents of {self!r} have {name}={has} together, got {name}={got}")
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Segments:
        return made(self.packed, self.within, self.has_gaps, lengths)

    def facts(self) -> tuple[Any, ...]:
        inner = None if self.within is None else (type(self.within), self.within.facts())
        return self.packed, inner, self.has_gaps

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Segments:
        packed, inner, has_gaps = facts
        # Without lengths: those of the documents are known, also where those of the sequence are symbolic.
        within = None if inner is None else inner[0](*inner[1])
        return made(packed, within, has_gaps, lengths)

    # The rule, and what follows from it

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.rule(q.device)(b, h, q, k)

    def rule(self, device: torch.device | str) -> Rule:
        low, high = _ranges_on(self.packed, band_of(self.within), torch.device(device))
        return lambda b, h, q, k: (k >= low[q]) & (k < high[q])

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        return rows_of(self.packed, band_of(self.within)).span(q0, q1)

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        rows = rows_of(self.packed, band_of(self.within))
        if not rows.any(q0, q1, k0, k1):
            return "empty"
        return "full" if rows.all(q0, q1, k0, k1) else "mixed"

    def pairs(self) -> float:
        self.bound_lengths()
        return _pairs(self.packed, band_of(self.within))

    def normalize(self) -> Segments | Causal | Window | None:
        lengths = self.bound_lengths()
        packed, band, count, end = _simplest(self.packed, band_of(self.within))
        within = mask_of(band)
        has_gaps = self.has_gaps and not (end >= 0 and known(lengths[1] == end))
        if count < 2 and not has_gaps:
            return None if within is None else within.at(lengths).normalize()
        if (packed, within, has_gaps) == (self.packed, self.within, self.has_gaps):
            return self
        return made(packed, within, has_gaps, lengths)

    def joined(self, other: Mask) -> Segments | None:
        """Both masks as one, where that can be said of each document; None where it cannot."""
        lengths = self.bound_lengths()
        if isinstance(other, Segments):
            if (self.packed, self.has_gaps) != (other.packed, other.has_gaps):
                return None
            band = _joined(self.packed, band_of(self.within), band_of(other.within), None)
        elif isinstance(other, (Causal, Window)):
            diagonal = 0
            if other.corner == "bottom-right":
                if self.has_gaps and _is_tracing():  # the number of keys may be symbolic
                    return None
                diagonal = lengths[1] - lengths[0]
            band = _joined(self.packed, band_of(self.within), band_of(other), operator.index(diagonal))
        else:
            return None
        return None if band is None else made(self.packed, mask_of(band), self.has_gaps, lengths)

    def from_bottom_right(self) -> Segments | None:
        """The same with `within` from the bottom right of each document, for kernels that know no other corner; None
        where no such mask is the same.

        Where every document has, say, two keys more than queries, Window(2, 0, "bottom-right") is
        Window(0, 2, "top-left"), which is what it is normalized to.
        """
        if self.within is None or self.within.corner == "bottom-right":
            return self
        band = _from_bottom_right(self.packed, band_of(self.within))
        return None if band is None else made(self.packed, mask_of(band), self.has_gaps, self.lengths)

    @property
    def has_padding(self) -> bool:
        return self.has_gaps

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor | None:
        if not self.has_gaps:
            return None
        seqlen_kv = self.bound_lengths()[1]
        k = torch.arange(seqlen_kv, device="cpu" if device is None else device)
        _, seqlens, starts = torch.tensor(numbers(self.packed), device="cpu").to(k.device)
        # As many documents have begun as have ended where a key belongs to none.
        begun, ended = (torch.searchsorted(edges, k, right=True) for edges in (starts, starts + seqlens))
        return (begun != ended)[None]


def made(packed: bytes, within: Causal | Window | None, has_gaps: bool, lengths: tuple[int, int] | None) -> Segments:
    """One of values that were checked before."""
    bias = object.__new__(Segments)
    bias._set(packed, within, has_gaps, lengths)
    return bias


def band_of(within: Causal | Window | None) -> Band:
    """The limits of `within`, as plain numbers."""
    if within is None:
        return WHOLE
    if isinstance(within, Causal):
        return None, 0, within.corner
    left, right = within.left, within.right
    return (
        None if left is None else operator.index(left),
        None if right is None else operator.index(right),
        within.corner,
    )


def mask_of(band: Band) -> Causal | Window | None:
    """The simplest kind with these limits, unbound."""
    left, right, corner = band
    if left is None and right is None:
        return None
    return Causal(corner) if left is None and right == 0 else Window(left, right, corner)


def _kind(within: Causal | Window | None) -> str:
    return "Causal" if isinstance(within, Causal) else "Window"


def _shown(values: Sequence[int]) -> str:
    if len(values) <= 2 * SHOWN:
        return str(list(values))
    listed = ", ".join([*map(str, values[:SHOWN]), "…", *map(str, values[-SHOWN:])])
    return f"<{len(values)} documents: {listed}>"


# Constants where a graph is traced


@constant
def totals(packed: bytes) -> tuple[int, int]:
    """(queries in all, the end of the last key)."""
    documents = unpack(packed)
    return documents.q[-1], documents.k1[-1] if documents.k1 else 0


@constant
def _simplest(packed: bytes, band: Band) -> tuple[bytes, Band, int, int]:
    """(documents, none of them empty; what `band` is in each; how many; where the keys end, -1 where gaps are left)."""
    packed = without_empty(packed)
    documents = unpack(packed)
    simplest = common_band(documents, [band])
    assert simplest is not None  # the band itself would do
    follow = documents.k0 == [0, *documents.k1][:-1]
    end = documents.k1[-1] if documents.k1 else 0
    return packed, simplest, len(documents.k0), end if follow else -1


@constant
def _from_bottom_right(packed: bytes, band: Band) -> Band | None:
    return common_band(unpack(packed), [band], corners=("bottom-right",))


@constant
def _joined(packed: bytes, own: Band, other: Band, diagonal: int | None) -> Band | None:
    return common_band(unpack(packed), [own, other], diagonal)


@constant
def _pairs(packed: bytes, band: Band) -> float:
    return rows_of(packed, band).pairs


@lru_cache(maxsize=8)
def _kept_ranges(packed: bytes, band: Band, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return key_ranges(numbers(packed), band).to(device)


def _ranges_on(packed: bytes, band: Band, device: torch.device) -> Tensor:
    # What is made in a graph belongs to it, and under fake tensors, say, it is of no use later.
    if _is_tracing() or torch._C._len_torch_dispatch_stack():
        return key_ranges(numbers(packed), band).to(device)
    return _kept_ranges(packed, band, device)
