"""PrefixLM: a prefix that every query sees, and what follows it causal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import Mask, Rule, TileKind, known
from .causal import Causal
from .diagonal import Corner, check_corner, check_corner_is_decided, clipped_pairs, offset
from .whole_numbers import as_int, is_int, is_readable, shown, whole_numbers


@dataclass(frozen=True, repr=False, eq=False, init=False)
class PrefixLM(Mask):
    """Query i sees the first `prefix` keys, and all up to the diagonal.

    Args:
        prefix: keys that every query sees, >= 0; as many as seqlen_kv, or more, are all. An int, or one for each batch
            entry, `[batch]`: an integer tensor (on any device) or a sequence of ints.
        corner: as for Causal.

        PrefixLM(2) on 4 x 4
        ██··
        ██··
        ███·
        ████

    Raises InputTypeError for anything but integers; InputError for another rank, another corner, a prefix below 0
    (checked where that needs no wait for a device), or, when bound, for a missing corner on unequal lengths.
    """

    prefix: int | Tensor
    corner: Corner | None = None
    lengths: tuple[int, int] | None = None

    def __init__(
        self,
        prefix: int | Tensor | Sequence[int],
        corner: Corner | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        check_corner("PrefixLM", corner)
        prefix = as_int(prefix)
        if not is_int(prefix) and not isinstance(prefix, (Tensor, Sequence)):
            raise InputTypeError(
                f"PrefixLM: prefix must be an int, or an integer tensor or ints for each batch entry, got {prefix!r}"
            )
        if isinstance(prefix, (int, torch.SymInt)):
            if prefix < 0:
                raise InputError(f"PrefixLM: prefix counts keys, so it must be >= 0, got {prefix}")
        else:
            prefix = whole_numbers("PrefixLM", "prefix", prefix, 1)
            for b, keys in enumerate(prefix.tolist() if is_readable(prefix) else ()):
                if keys < 0:
                    raise InputError(
                        f"PrefixLM: prefix counts keys, so it must be >= 0, got {keys} for batch entry {b}"
                    )
        _set(self, prefix, corner, lengths)

    def __repr__(self) -> str:
        keys = shown(self.prefix) if isinstance(self.prefix, Tensor) else self.prefix
        text = f'PrefixLM({keys}, "{self.corner}")' if self.corner else f"PrefixLM({keys})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return (self.prefix.shape[0] if isinstance(self.prefix, Tensor) else 1), 1

    @property
    def device(self) -> torch.device | None:
        """None: the numbers are few, and go where they are needed."""
        return None

    def bind(self, seqlen_q: int, seqlen_kv: int) -> PrefixLM:
        self._check_rebind(seqlen_q, seqlen_kv)
        check_corner_is_decided("PrefixLM", self.corner, seqlen_q, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> PrefixLM:
        return _made(self.prefix, self.corner, lengths)

    def with_held(self, tensors: dict[str, Tensor]) -> PrefixLM:
        return _made(tensors.get("prefix", self.prefix), self.corner, self.lengths)

    def facts(self) -> tuple[Any, ...]:
        held = isinstance(self.prefix, Tensor)
        return self.prefix.dtype if held else None, None if held else self.prefix, self.corner  # type: ignore[union-attr]

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> PrefixLM:
        dtype, keys, corner = facts
        return _made(keys if dtype is None else torch.empty(batch, dtype=dtype, device="meta"), corner, lengths)

    @property
    def offset(self) -> int:
        """The key on the diagonal of query 0."""
        return offset(self.corner, *self.bound_lengths())

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.rule(k.device)(b, h, q, k)

    def rule(self, device: torch.device | str) -> Rule:
        diagonal, prefix = self.offset, self.prefix
        if not isinstance(prefix, Tensor):
            return lambda b, h, q, k: (k <= q + diagonal) | (k < prefix)
        held = prefix.to(device)
        return lambda b, h, q, k: (k <= q + diagonal) | (k < held[b])

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        seqlen_kv = self.bound_lengths()[1]
        return 0, max(0, min(max(q1 + self.offset, self._shortest_and_longest()[1]), seqlen_kv))

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        shortest, longest = self._shortest_and_longest()
        if k0 >= max(q1 + self.offset, longest):
            return "empty"
        return "full" if k1 <= max(q0 + self.offset + 1, shortest) else "mixed"

    def _shortest_and_longest(self) -> tuple[int, int]:
        """Of all batch entries; where they cannot be read, what is certain."""
        if not isinstance(self.prefix, Tensor):
            return self.prefix, self.prefix
        if not is_readable(self.prefix) or not len(self.prefix):
            return 0, self.bound_lengths()[1]
        shortest, longest = self.prefix.aminmax()
        return int(shortest), int(longest)

    def pairs(self) -> float:
        """From above where each batch entry has its own prefix."""
        seqlen_q, seqlen_kv = self.bound_lengths()
        if isinstance(self.prefix, Tensor):
            return super().pairs()
        prefix = min(self.prefix, seqlen_kv)
        return float(seqlen_q * prefix) + clipped_pairs(seqlen_q, seqlen_kv - prefix, self.offset - prefix)

    def normalize(self) -> PrefixLM | Causal | None:
        seqlen_q, seqlen_kv = lengths = self.bound_lengths()
        if not isinstance(self.prefix, Tensor):
            if known(self.prefix >= seqlen_kv):
                return None
            if known(self.prefix <= self.offset + 1) or known(self.prefix <= 0):  # query 0 sees that much by itself
                return Causal(self.corner, lengths).normalize()
        if known(self.offset >= seqlen_kv - 1):
            return None
        if self.corner != "top-left" and known(seqlen_q == seqlen_kv):
            return _made(self.prefix, "top-left", lengths)
        return self


def _made(prefix: int | Tensor, corner: Corner | None, lengths: tuple[int, int] | None) -> PrefixLM:
    """One of values that were checked before."""
    bias = object.__new__(PrefixLM)
    _set(bias, prefix, corner, lengths)
    return bias


def _set(bias: PrefixLM, prefix: int | Tensor, corner: Corner | None, lengths: tuple[int, int] | None) -> None:
    object.__setattr__(bias, "prefix", prefix)
    object.__setattr__(bias, "corner", corner)
    object.__setattr__(bias, "lengths", lengths)
