"""Window: each query sees the keys within a distance of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import InputError
from .base import Mask, TileKind, known
from .causal import Causal
from .diagonal import Corner, check_corner, check_corner_is_decided, clipped_pairs, offset
from .whole_numbers import as_int, is_count


@dataclass(frozen=True, repr=False, init=False)  # built for every call by many: its own __init__ takes a third less
class Window(Mask):
    """Query i sees `left` keys before the diagonal, the key on it, and `right` keys behind: left + 1 + right in all.

    None means no limit on that side. `corner` as for `Causal`.

        Window(2, 1) on 5 x 5
        ██···
        ███··
        ████·
        ·████
        ··███

    Raises InputError for a negative limit or another corner, or, when bound, for a missing corner on unequal lengths.
    """

    left: int | None
    right: int | None
    corner: Corner | None = None
    lengths: tuple[int, int] | None = None
    key: tuple[object, ...] = field(init=False, compare=False)

    def __init__(
        self,
        left: int | None,
        right: int | None,
        corner: Corner | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        left, right = as_int(left), as_int(right)
        check_corner("Window", corner)
        _check_limit("left", left)
        _check_limit("right", right)
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)
        object.__setattr__(self, "corner", corner)
        if lengths is not None:  # which it is until bound
            object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "key", (Window, left, right, corner, lengths))

    def __repr__(self) -> str:
        corner = f', "{self.corner}"' if self.corner else ""
        text = f"Window({self.left}, {self.right}{corner})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Window:
        self._check_rebind(seqlen_q, seqlen_kv)
        check_corner_is_decided("Window", self.corner, seqlen_q, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Window:
        return replace(self, lengths=lengths)

    def facts(self) -> tuple[Any, ...]:
        return self.left, self.right, self.corner

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Window:
        left, right, corner = facts
        return cls(left, right, corner, lengths)

    @property
    def offset(self) -> int:
        """The key on the diagonal of query 0."""
        return offset(self.corner, *self.bound_lengths())

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k - (q + self.offset)
        if self.right is None:
            return distance >= -self.left if self.left is not None else distance == distance
        if self.left is None:
            return distance <= self.right
        return (distance >= -self.left) & (distance <= self.right)

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        seqlen_kv = self.bound_lengths()[1]
        low = 0 if self.left is None else q0 + self.offset - self.left
        high = seqlen_kv if self.right is None else q1 + self.offset + self.right
        low = min(max(low, 0), seqlen_kv)
        return low, max(low, min(high, seqlen_kv))

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        low, high = self.span(q0, q1)
        if k1 <= low or k0 >= high:
            return "empty"
        left_full = self.left is None or k0 >= q1 - 1 + self.offset - self.left
        right_full = self.right is None or k1 - 1 <= q0 + self.offset + self.right
        return "full" if left_full and right_full else "mixed"

    def pairs(self) -> float:
        seqlen_q, seqlen_kv = self.bound_lengths()
        upto = clipped_pairs
        right = seqlen_q * seqlen_kv if self.right is None else upto(seqlen_q, seqlen_kv, self.offset + self.right)
        left = 0.0 if self.left is None else upto(seqlen_q, seqlen_kv, self.offset - self.left - 1)
        return float(right - left)

    def normalize(self) -> Window | Causal | None:
        seqlen_q, seqlen_kv = self.bound_lengths()
        left, right = self.left, self.right
        if left is not None and known(seqlen_q - 1 + self.offset <= left):
            left = None
        if right is not None and known(self.offset + right >= seqlen_kv - 1):
            right = None
        if left is None and right is None:
            return None
        if left is None and right == 0:
            return Causal(self.corner, self.lengths).normalize()
        corner: Corner | None = "top-left" if known(seqlen_q == seqlen_kv) else self.corner
        if (left, right, corner) == (self.left, self.right, self.corner):
            return self
        return replace(self, left=left, right=right, corner=corner)


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and not is_count(limit):
        raise InputError(
            f"Window: {name} counts keys beside the diagonal, so it must be an int >= 0,"
            f" or None for no limit; got {limit!r}"
        )
