"""Intersection: several masks at once, as `a & b` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputTypeError
from .bands import with_one_band
from .base import Mask, Rule, TileKind
from .joint import Joint
from .segments import Segments


@dataclass(frozen=True, repr=False, eq=False)
class Intersection(Joint, Mask):
    """Query q may attend key k where every part lets it: `Causal() & KeyPadding([3, 5])`.

        Causal() & Window(2, 2) on 5 x 5
        █····
        ██···
        ███··
        ·███·
        ··███

    Made by `&`, which flattens. Raises InputTypeError for anything but masks, InputError for fewer than two, or for
    masks that were made for other lengths, batches or heads.
    """

    parts: tuple[Mask, ...]
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Mask):
                raise InputTypeError(f"Intersection: takes masks, got {type(part).__name__}")
        self.check_parts()

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept = self.parts[0].keep(b, h, q, k)
        for mask in self.parts[1:]:
            kept = kept & mask.keep(b, h, q, k)
        return kept

    def rule(self, device: torch.device | str) -> Rule:
        first, *others = [mask.rule(device) for mask in self.parts]

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            kept = first(b, h, q, k)
            for rule in others:
                kept = kept & rule(b, h, q, k)
            return kept

        return keep

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        spans = [mask.span(q0, q1) for mask in self.parts]
        low = max(low for low, _ in spans)
        return low, max(low, min(high for _, high in spans))

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        kinds = {mask.tile(q0, q1, k0, k1) for mask in self.parts}
        if "empty" in kinds:
            return "empty"
        return "full" if kinds == {"full"} else "mixed"

    def pairs(self) -> float:
        return min(mask.pairs() for mask in self.parts)

    def normalize(self) -> Mask | None:
        left: list[Mask] = []
        for mask in self.parts:
            simpler = mask.normalize()
            assert simpler is None or isinstance(simpler, Mask)
            # Twice the same is once; what holds data may differ under one key.
            if simpler is not None and (simpler.holds_data or all(simpler.key != other.key for other in left)):
                left.append(simpler)
        left = _joined(with_one_band(_joined(left), self.bound_lengths()))
        if len(left) < 2:
            return left[0] if left else None
        if len(left) == len(self.parts) and all(new is old for new, old in zip(left, self.parts)):
            return self
        return Intersection(tuple(left), self.lengths)


def _joined(masks: list[Mask]) -> list[Mask]:
    """The same with documents, and what can be said within each of them, as one mask."""
    for segments in masks:
        if isinstance(segments, Segments):
            for other in masks:
                both = None if other is segments else segments.joined(other)
                if both is not None:
                    return _joined([both] + [mask for mask in masks if mask is not segments and mask is not other])
    return masks
