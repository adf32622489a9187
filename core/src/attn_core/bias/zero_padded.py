"""ZeroPadded: a mask behind whose lengths there are zeros, and no longer anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import AttnBias, Mask, Rule, TileKind


@dataclass(frozen=True, repr=False, eq=False)
class ZeroPadded(Mask):
    """The rule of `padded`, for keys and values that hold zeros in its padding.

    Made by `without_padding`, when that has been done: a kernel then needs to mask only, so one of any mask takes it.
    """

    padded: Mask
    lengths: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"ZeroPadded({self.padded!r})"

    @property
    def key(self) -> tuple[object, ...]:
        return ZeroPadded, self.padded.key

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return self.padded.batch_and_heads

    @property
    def device(self) -> torch.device | None:
        return self.padded.device

    def held(self) -> dict[str, Tensor]:
        return self.padded.held()

    @property
    def holds_data(self) -> bool:
        return self.padded.holds_data

    @property
    def requires_grad(self) -> bool:
        return self.padded.requires_grad

    def with_held(self, tensors: dict[str, Tensor]) -> ZeroPadded:
        return ZeroPadded(self.padded.with_held(tensors), self.lengths)

    def bind(self, seqlen_q: int, seqlen_kv: int) -> ZeroPadded:
        return ZeroPadded(self.padded.bind(seqlen_q, seqlen_kv), (seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> ZeroPadded:
        return ZeroPadded(self.padded.at(lengths), lengths)

    def facts(self) -> tuple[Any, ...]:
        return type(self.padded), self.padded.facts()

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> ZeroPadded:
        kind, own = facts
        return cls(kind.from_facts(own, batch, num_heads, lengths), lengths)

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.padded.keep(b, h, q, k)

    def rule(self, device: torch.device | str) -> Rule:
        return self.padded.rule(device)

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        return self.padded.span(q0, q1)

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        return self.padded.tile(q0, q1, k0, k1)

    def pairs(self) -> float:
        return self.padded.pairs()

    def normalize(self) -> AttnBias | None:
        simpler = self.padded.normalize()
        return self if simpler is self.padded else None if simpler is None else simpler.without_padding()
