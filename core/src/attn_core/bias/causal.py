"""Causal: no query sees a key behind the diagonal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .base import Mask, TileKind, known
from .diagonal import Corner, check_corner, check_corner_is_decided, clipped_pairs, offset


@dataclass(frozen=True, repr=False, init=False)  # built for every call by many: its own __init__ takes a third less
class Causal(Mask):
    """Query i sees the keys up to the diagonal, itself included.

    `corner` says where the diagonal starts: "top-left" (as `is_causal=True` in torch) or "bottom-right" (as in
    FlashAttention). It may be left out only where seqlen_q equals seqlen_kv, and both agree.

    Raises InputError for another corner, or, when bound, for a missing one on unequal lengths.
    """

    corner: Corner | None = None
    lengths: tuple[int, int] | None = None
    key: tuple[object, ...] = field(init=False, compare=False)

    def __init__(self, corner: Corner | None = None, lengths: tuple[int, int] | None = None) -> None:
        check_corner("Causal", corner)
        object.__setattr__(self, "corner", corner)
        if lengths is not None:  # which it is until bound
            object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "key", (Causal, corner, lengths))

    def __repr__(self) -> str:
        text = f'Causal("{self.corner}")' if self.corner else "Causal()"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Causal:
        self._check_rebind(seqlen_q, seqlen_kv)
        check_corner_is_decided("Causal", self.corner, seqlen_q, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Causal:
        return replace(self, lengths=lengths)

    def facts(self) -> tuple[Any, ...]:
        return (self.corner,)

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Causal:
        return cls(facts[0], lengths)

    @property
    def offset(self) -> int:
        """The key on the diagonal of query 0."""
        return offset(self.corner, *self.bound_lengths())

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + self.offset

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        return 0, max(0, min(q1 + self.offset, self.bound_lengths()[1]))

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        if k0 > q1 - 1 + self.offset:
            return "empty"
        return "full" if k1 - 1 <= q0 + self.offset else "mixed"

    def pairs(self) -> float:
        seqlen_q, seqlen_kv = self.bound_lengths()
        return clipped_pairs(seqlen_q, seqlen_kv, self.offset)

    def normalize(self) -> Causal | None:
        seqlen_q, seqlen_kv = self.bound_lengths()
        # Every query sees every key: one key, or a single query on the last one (a decoding step).
        if known(self.offset >= seqlen_kv - 1):
            return None
        if self.corner != "top-left" and known(seqlen_q == seqlen_kv):
            return replace(self, corner="top-left")
        return self
