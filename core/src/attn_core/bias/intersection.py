"""Intersection: several masks at once, as `a & b` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import Mask, TileKind


@dataclass(frozen=True, repr=False, eq=False)
class Intersection(Mask):
    """Query q may attend key k where every one of `masks` lets it: `Causal() & KeyPadding([3, 5])`.

        Causal() & Window(2, 2) on 5 x 5
        █····
        ██···
        ███··
        ·███·
        ··███

    Made by `&`, which flattens. Raises InputTypeError for anything but masks, InputError for fewer than two, or for
    masks that were made for other lengths, batches or heads.
    """

    masks: tuple[Mask, ...]
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise InputTypeError(f"Intersection: takes masks, got {type(mask).__name__}")
        if len(self.masks) < 2:
            raise InputError(f"Intersection: takes two masks or more, got {len(self.masks)}")
        first = next((mask for mask in self.masks if mask.lengths is not None), None)
        for mask in self.masks:
            if first is not None and mask.lengths is not None and mask.lengths != first.lengths:
                raise InputError(f"Intersection: {mask!r} was made for other lengths than {first!r}")
        for place, name in enumerate(("batch", "num_heads")):
            sizes = {mask.batch_and_heads[place] for mask in self.masks} - {1}
            if len(sizes) > 1:
                made_for = " and ".join(map(str, sorted(sizes)))
                raise InputError(f"Intersection: its masks were made for {name}={made_for}")

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.masks))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, Intersection)
        return self.masks == other.masks and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[object, ...]:  # type: ignore[override]
        return (Intersection, *[mask.key for mask in self.masks], self.lengths)

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        sizes = [mask.batch_and_heads for mask in self.masks]
        return max(batch for batch, _ in sizes), max(heads for _, heads in sizes)

    @property
    def holds_data(self) -> bool:
        return any(mask.holds_data for mask in self.masks)

    @property
    def has_padding(self) -> bool:
        return any(mask.has_padding for mask in self.masks)

    @property
    def device(self) -> torch.device | None:
        return next((mask.device for mask in self.masks if mask.device is not None), None)

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Intersection:
        return Intersection(tuple(mask.bind(seqlen_q, seqlen_kv) for mask in self.masks), (seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Intersection:
        return Intersection(tuple(mask.at(lengths) for mask in self.masks), lengths)

    def without_data(self) -> Intersection:
        return Intersection(tuple(mask.without_data() for mask in self.masks), self.lengths)

    def facts(self) -> tuple[Any, ...]:
        facts = []
        for mask in self.masks:
            batch, num_heads = mask.batch_and_heads
            # Branching on a symbolic size, not bool(), makes the answer a constant of the graph.
            many_batches, many_heads = (True if size != 1 else False for size in (batch, num_heads))  # noqa: SIM210
            facts.append((type(mask), mask.facts(), many_batches, many_heads))
        return tuple(facts)

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Intersection:
        masks = [
            kind.from_facts(own, batch if batches else 1, num_heads if heads else 1, lengths)
            for kind, own, batches, heads in facts
        ]
        return cls(tuple(masks), lengths)

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept = self.masks[0].keep(b, h, q, k)
        for mask in self.masks[1:]:
            kept = kept & mask.keep(b, h, q, k)
        return kept

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        spans = [mask.span(q0, q1) for mask in self.masks]
        low = max(low for low, _ in spans)
        return low, max(low, min(high for _, high in spans))

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        kinds = {mask.tile(q0, q1, k0, k1) for mask in self.masks}
        if "empty" in kinds:
            return "empty"
        return "full" if kinds == {"full"} else "mixed"

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor | None:
        valid = None
        for mask in self.masks:
            own = mask.valid_keys(device)
            if own is not None:
                valid = own if valid is None else valid & own
        return valid

    def pairs(self) -> float:
        return min(mask.pairs() for mask in self.masks)

    def normalize(self) -> Mask | None:
        left: list[Mask] = []
        for mask in self.masks:
            simpler = mask.normalize()
            assert simpler is None or isinstance(simpler, Mask)
            # Twice the same is once; what holds data may differ under one key.
            if simpler is not None and (simpler.holds_data or all(simpler.key != other.key for other in left)):
                left.append(simpler)
        if len(left) < 2:
            return left[0] if left else None
        if len(left) == len(self.masks) and all(new is old for new, old in zip(left, self.masks)):
            return self
        return Intersection(tuple(left), self.lengths)
