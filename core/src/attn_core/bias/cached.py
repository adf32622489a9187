"""Cached: keys and values in a cache that has room for more; each sequence fills its own part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import Mask, known
from .causal import Causal
from .key_padding import KeyPadding
from .segments import band_of
from .whole_numbers import is_readable, shown, whole_numbers
from .window import Window


@dataclass(frozen=True, repr=False, eq=False, init=False)
class Cached(Mask):
    """The first `seqlens_kv[b]` keys of batch entry b exist; a query sees those of them that `within` lets it.

    Args:
        seqlens_kv: keys of each sequence, `[batch]`: an integer tensor (on any device) or a sequence of ints. What lies
            behind them may be anything, NaN too.
        within: an unbound Causal or Window with a corner, which counts on each sequence's own length: "bottom-right",
            the last query sees the last key that exists, as in FlashAttention with a KV cache. None: all that exist.

        Cached([3, 5], within=Causal("bottom-right")) on 2 queries, 6 keys
        ██····   batch entry 0
        ███···
        ████··   batch entry 1
        █████·

    Without `within` it is the same as KeyPadding. Raises InputTypeError for anything but integers; InputError for
    another rank, a `within` that is bound or has no corner, or, when bound, a length outside [0, seqlen_kv] (checked
    where that needs no wait for a device).
    """

    seqlens_kv: Tensor
    within: Causal | Window | None
    lengths: tuple[int, int] | None = None

    def __init__(
        self,
        seqlens_kv: Tensor | Sequence[int],
        *,
        within: Causal | Window | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        check_within("Cached", within)
        object.__setattr__(self, "seqlens_kv", whole_numbers("Cached", "seqlens_kv", seqlens_kv, 1))
        object.__setattr__(self, "within", within)
        object.__setattr__(self, "lengths", lengths)

    def __repr__(self) -> str:
        text = f"Cached({shown(self.seqlens_kv)}{told_within(self.within)})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def key(self) -> tuple[object, ...]:
        n = self.seqlens_kv
        inner = None if self.within is None else self.within.key
        return Cached, type(n), n.shape, n.dtype, n.device, inner, self.lengths

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return self.seqlens_kv.shape[0], 1

    @property
    def device(self) -> torch.device | None:
        """None: the lengths are few, and go where they are needed."""
        return None

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Cached:
        self._check_rebind(seqlen_q, seqlen_kv)
        check_seqlens("Cached", self.seqlens_kv, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Cached:
        return made(self.seqlens_kv, self.within, lengths)

    def facts(self) -> tuple[Any, ...]:
        return self.seqlens_kv.dtype, facts_of(self.within)

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Cached:
        dtype, inner = facts
        return made(torch.empty(batch, dtype=dtype, device="meta"), within_of(inner), lengths)

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seqlens = self.seqlens_kv.to(k.device, torch.int64)[b]
        kept = k < seqlens
        if self.within is None:
            return kept
        left, right, corner = band_of(self.within)
        diagonal = q + (seqlens - self.bound_lengths()[0]) if corner == "bottom-right" else q
        if left is not None:
            kept = kept & (k >= diagonal - left)
        return kept if right is None else kept & (k <= diagonal + right)

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        lengths = self.bound_lengths()
        if self.within is None:
            return 0, lengths[1]
        low, high = self.within.at(lengths).span(q0, q1)  # a sequence that fills its room sees furthest
        return (0 if self.within.corner == "bottom-right" else low), high

    def pairs(self) -> float:
        """Of sequences that fill their room."""
        lengths = self.bound_lengths()
        return super().pairs() if self.within is None else self.within.at(lengths).pairs()

    def normalize(self) -> Mask:
        lengths = self.bound_lengths()
        within = simplest(self.within, *lengths)
        if within is None:
            return KeyPadding(self.seqlens_kv, lengths)
        return self if within is self.within else made(self.seqlens_kv, within, lengths)

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor:
        seqlens = self.seqlens_kv if device is None else self.seqlens_kv.to(device)
        return torch.arange(self.bound_lengths()[1], device=seqlens.device) < seqlens[:, None]


def made(seqlens_kv: Tensor, within: Causal | Window | None, lengths: tuple[int, int] | None) -> Cached:
    """One of values that were checked before."""
    bias = object.__new__(Cached)
    object.__setattr__(bias, "seqlens_kv", seqlens_kv)
    object.__setattr__(bias, "within", within)
    object.__setattr__(bias, "lengths", lengths)
    return bias


# What kinds with a length per sequence have in common


def check_seqlens(kind: str, seqlens_kv: Tensor, seqlen_kv: int) -> None:
    if not is_readable(seqlens_kv):
        return
    for b, length in enumerate(seqlens_kv.tolist()):
        if not 0 <= length <= seqlen_kv:
            raise InputError(f"bias: {kind} seqlens_kv must lie in [0, {seqlen_kv}], got {length} for batch entry {b}")


def check_within(kind: str, within: Any) -> None:
    if within is None:
        return
    if not isinstance(within, (Causal, Window)):
        raise InputTypeError(f"{kind}: within takes Causal, Window or None, got {type(within).__name__}")
    if within.lengths is not None:
        raise InputError(f"{kind}: within must not be bound, as each sequence has its own length; got {within!r}")
    if within.corner is None:
        raise InputError(
            f"{kind}: within={within!r} has no corner, and sequences have their own lengths: say"
            ' "bottom-right" (the last query sees the last key that exists, as in FlashAttention with a KV cache)'
            ' or "top-left" (query 0 sees key 0)'
        )


def told_within(within: Causal | Window | None) -> str:
    return "" if within is None else f", within={within!r}"


def facts_of(within: Causal | Window | None) -> tuple[Any, ...] | None:
    return None if within is None else (type(within), *within.facts())


def within_of(facts: tuple[Any, ...] | None) -> Causal | Window | None:
    within: Causal | Window | None = None if facts is None else facts[0](*facts[1:])
    return within


def simplest(within: Causal | Window | None, seqlen_q: int, seqlen_kv: int) -> Causal | Window | None:
    """The simplest that means the same for every sequence of up to `seqlen_kv` keys; None for all that exist."""
    if within is None:
        return None
    left, right, corner = band_of(within)
    last_left, last_right = (seqlen_kv - 1, seqlen_q - 1)  # a limit as wide as this leaves nothing out
    if corner == "top-left":
        last_left, last_right = last_right, last_left
    if left is not None and known(left >= last_left):
        left = None
    if right is not None and known(right >= last_right):
        right = None
    if left is None and right is None:
        return None
    if isinstance(within, Causal):
        return within
    if left is None and right == 0:
        return Causal(corner)
    same = (left, right) == (within.left, within.right)
    return within if same else Window(left, right, corner)
