"""Paged: the keys and values of a KV cache that lie in pages, found by a table per sequence."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InputError, InputTypeError
from .base import AttnBias, Mask
from .cached import Cached, check_seqlens, check_within, facts_of, simplest, told_within, within_of
from .cached import made as cached
from .causal import Causal
from .whole_numbers import as_int, is_int, is_readable, shown, whole_numbers
from .window import Window


@dataclass(frozen=True, repr=False, eq=False, init=False)
class Paged(Mask):
    """Key and value are `[num_pages, page_size, num_kv_heads, head_dim]`, and a table says whose they are.

    Key k of batch entry b is row `k % page_size` of page `page_table[b, k // page_size]`; it exists where
    `k < seqlens_kv[b]`. So seqlen_kv is `max_pages * page_size`.

    Args:
        page_table: `[batch, max_pages]`, integers, on query's device (or rows of ints). Sequences may share pages.
            Entries behind a sequence's end may be anything, -1 too.
        seqlens_kv: keys of each sequence, `[batch]`: an integer tensor (on any device) or a sequence of ints.
        page_size: keys in a page, at least 1: `key.shape[1]`.
        within: an unbound Causal or Window with a corner, which counts on each sequence's own length: "bottom-right",
            the last query sees the last key that exists, as in FlashAttention with a KV cache. None: all that exist.

        Paged([[2, 0], [2, 1]], [3, 4], 2)       pages of key        keys of each sequence
        ███·   batch entry 0                     0: e ?              a b e
        ████   batch entry 1                     1: c d              a b c d
                                                 2: a b

    What lies behind a sequence's end may be anything, NaN too, and never leaks. Raises InputTypeError for anything but
    integers; InputError for another rank, batches that differ, a page_size below 1, a `within` that is bound or has no
    corner; when bound, for another seqlen_kv or a length outside [0, seqlen_kv]. An entry of the table before its
    sequence's end that is no page is an InputError as well. Lengths and entries are checked where that needs no wait
    for a device; where it does, a wrong entry reads some other page of the same pool.
    """

    page_table: Tensor
    seqlens_kv: Tensor
    page_size: int
    within: Causal | Window | None
    lengths: tuple[int, int] | None = None

    def __init__(
        self,
        page_table: Tensor | Sequence[Sequence[int]],
        seqlens_kv: Tensor | Sequence[int],
        page_size: int,
        *,
        within: Causal | Window | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        check_within("Paged", within)
        table = whole_numbers("Paged", "page_table", page_table, 2)
        seqlens = whole_numbers("Paged", "seqlens_kv", seqlens_kv, 1)
        if table.shape[0] != seqlens.shape[0]:
            raise InputError(f"Paged: page_table has batch={table.shape[0]}, seqlens_kv has batch={seqlens.shape[0]}")
        page_size = as_int(page_size)
        if not is_int(page_size):
            raise InputTypeError(f"Paged: page_size must be an int, got {page_size!r}")
        if page_size < 1:
            raise InputError(f"Paged: page_size must be at least 1, got {page_size}")
        _set(self, table, seqlens, operator.index(page_size), within, lengths)

    def __repr__(self) -> str:
        table = f"<{self.page_table.shape[0]} x {self.page_table.shape[1]} pages of {self.page_size}>"
        text = f"Paged({table}, {shown(self.seqlens_kv)}{told_within(self.within)})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def key(self) -> tuple[object, ...]:
        table, n = self.page_table, self.seqlens_kv
        of_table = type(table), table.shape, table.dtype, table.device, table.stride()
        inner = None if self.within is None else self.within.key
        return Paged, *of_table, type(n), n.shape, n.dtype, n.device, n.stride(), self.page_size, inner, self.lengths

    @property
    def seqlen_kv(self) -> int:
        """The room of a sequence: `max_pages * page_size`."""
        return self.page_table.shape[1] * self.page_size

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return self.page_table.shape[0], 1

    @property
    def device(self) -> torch.device | None:
        """Where the table lies; the lengths are few, and go where they are needed."""
        return self.page_table.device

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Paged:
        self._check_rebind(seqlen_q, seqlen_kv)
        if seqlen_kv != self.seqlen_kv:
            raise InputError(
                f"bias: {self!r} has room for max_pages * page_size = {self.seqlen_kv} keys, got seqlen_kv={seqlen_kv}"
            )
        check_seqlens("Paged", self.seqlens_kv, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def check_pages(self, num_pages: int) -> None:
        """Raises InputError where an entry before its sequence's end is no page of a pool of `num_pages`."""
        if not (self.page_table.numel() and is_readable(self.page_table) and is_readable(self.seqlens_kv)):
            return
        low, high = self.page_table.aminmax()
        if low >= 0 and high < num_pages:
            return
        first_keys = torch.arange(self.page_table.shape[1], device="cpu") * self.page_size
        no_page = (self.page_table < 0) | (self.page_table >= num_pages)
        wrong = (no_page & (first_keys < self.seqlens_kv[:, None])).nonzero()
        if len(wrong):
            b, p = wrong[0].tolist()
            raise InputError(
                f"bias: page_table[{b}, {p}] is {int(self.page_table[b, p])}, which must lie in [0,"
                f" num_pages={num_pages}), as batch entry {b} has {int(self.seqlens_kv[b])} keys, in pages of"
                f" {self.page_size}; only entries behind a sequence's end may be anything"
            )

    def at(self, lengths: tuple[int, int]) -> Paged:
        return _made(self.page_table, self.seqlens_kv, self.page_size, self.within, lengths)

    def facts(self) -> tuple[Any, ...]:
        return self.page_table.dtype, self.seqlens_kv.dtype, self.page_size, facts_of(self.within)

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Paged:
        of_table, of_seqlens, page_size, inner = facts
        table = torch.empty(batch, -(-lengths[1] // page_size), dtype=of_table, device="meta")
        seqlens = torch.empty(batch, dtype=of_seqlens, device="meta")
        return _made(table, seqlens, page_size, within_of(inner), lengths)

    # The rule: that of the same keys in a row

    @property
    def paged(self) -> Paged:
        return self

    def gathered(self) -> Cached:
        return cached(self.seqlens_kv, self.within, self.lengths)

    def without_padding(self) -> Paged:
        return self  # pages are shared and stay as they are; what is gathered from them can be zeroed

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in a row, `[batch, seqlen_kv, num_kv_heads, head_dim]`, of `[num_pages, page_size, ...]`.

        Copies, differentiable: a shared page gets the sum of its sequences' gradients. Behind a sequence's end lies
        anything.
        """
        if key.shape[0] == 0:  # all sequences are empty, and there must be a page to read
            key, value = (pad(pages, (0, 0) * 3 + (0, 1)) for pages in (key, value))
        table = self.page_table.to(key.device, torch.int64).clamp(0, key.shape[0] - 1).reshape(-1)
        room = self.page_table.shape[0], self.seqlen_kv
        return (
            key.index_select(0, table).reshape(*room, *key.shape[2:]),
            value.index_select(0, table).reshape(*room, *value.shape[2:]),
        )

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.gathered().keep(b, h, q, k)

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        return self.gathered().span(q0, q1)

    def pairs(self) -> float:
        """Of sequences that fill their room."""
        return self.gathered().pairs()

    def normalize(self) -> Paged:
        within = simplest(self.within, *self.bound_lengths())
        if within is self.within:
            return self
        return _made(self.page_table, self.seqlens_kv, self.page_size, within, self.lengths)

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor:
        return self.gathered().valid_keys(device)


def _made(
    page_table: Tensor,
    seqlens_kv: Tensor,
    page_size: int,
    within: Causal | Window | None,
    lengths: tuple[int, int] | None,
) -> Paged:
    """One of values that were checked before."""
    bias = object.__new__(Paged)
    _set(bias, page_table, seqlens_kv, page_size, within, lengths)
    return bias


def _set(
    bias: Paged,
    page_table: Tensor,
    seqlens_kv: Tensor,
    page_size: int,
    within: Causal | Window | None,
    lengths: tuple[int, int] | None,
) -> None:
    object.__setattr__(bias, "page_table", page_table)
    object.__setattr__(bias, "seqlens_kv", seqlens_kv)
    object.__setattr__(bias, "page_size", page_size)
    object.__setattr__(bias, "within", within)
    object.__setattr__(bias, "lengths", lengths)


def in_a_row(key: Tensor, value: Tensor, bias: AttnBias) -> tuple[Tensor, Tensor, AttnBias]:
    """Keys, values and bias with every page in its place; the same where there are no pages."""
    pages = bias.paged
    return (key, value, bias) if pages is None else (*pages.gather(key, value), bias.gathered())
