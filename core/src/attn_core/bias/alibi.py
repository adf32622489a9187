"""ALiBi: attention with linear biases. Press, Smith, Lewis 2022, arXiv:2108.12409."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .diagonal import Corner, check_corner, check_corner_is_decided, offset
from .score import Score
from .whole_numbers import as_int, is_count


@dataclass(frozen=True, repr=False, eq=False)
class ALiBi(Score):
    """Adds `-slope * |distance|`: the further a key lies from the diagonal, the less it counts.

    Args:
        num_heads: heads of query, at least 1.
        slopes: one per head `[num_heads]`, or per batch entry and head `[batch, num_heads]`, floating; a gradient flows
            to one that requires it. None: those of the paper, `2 ** (-8 * (h + 1) / num_heads)` where num_heads is a
            power of 2, else those of the power below it and every second one of the power above.
        corner: where the diagonal starts where the lengths differ, as for `Causal`.

    It masks nothing: a causal model writes `Causal() + ALiBi(num_heads)`. Raises InputError for a bad number of heads,
    a shape that does not fit or another corner, InputTypeError for slopes that are not floating.
    """

    num_heads: int
    slopes: Tensor | None = None
    corner: Corner | None = None
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_corner("ALiBi", self.corner)
        object.__setattr__(self, "num_heads", as_int(self.num_heads))
        if not is_count(self.num_heads, 1):
            raise InputError(f"ALiBi: num_heads must be an int >= 1, got {self.num_heads!r}")
        if self.slopes is None:
            return
        if not isinstance(self.slopes, Tensor) or not self.slopes.is_floating_point():
            got = self.slopes.dtype if isinstance(self.slopes, Tensor) else type(self.slopes).__name__
            raise InputTypeError(f"ALiBi: slopes must be a floating tensor, got {got}")
        if self.slopes.ndim not in (1, 2) or self.slopes.shape[-1] != self.num_heads:
            raise InputError(
                f"ALiBi: slopes must be [num_heads={self.num_heads}] or [batch, {self.num_heads}],"
                f" got shape {list(self.slopes.shape)}"
            )

    def __repr__(self) -> str:
        slopes = "" if self.slopes is None else f", slopes={list(self.slopes.shape)}"
        grad = " requires_grad" if self.requires_grad else ""
        corner = f', corner="{self.corner}"' if self.corner else ""
        text = f"ALiBi({self.num_heads}{slopes}{grad}{corner})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        batch = self.slopes.shape[0] if self.slopes is not None and self.slopes.ndim == 2 else 1
        return batch, self.num_heads

    def bind(self, seqlen_q: int, seqlen_kv: int) -> ALiBi:
        self._check_rebind(seqlen_q, seqlen_kv)
        check_corner_is_decided("ALiBi", self.corner, seqlen_q, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    def added(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        distance = (k - (q + offset(self.corner, *self.bound_lengths()))).abs()
        if self.slopes is None:
            slope = paper_slopes(h, self.num_heads, dtype)
        else:
            slope = self.slopes[h] if self.slopes.ndim == 1 else self.slopes[b, h]
        return -slope.to(dtype) * distance.to(dtype)

    def facts(self) -> tuple[Any, ...]:
        slopes = None if self.slopes is None else (self.slopes.ndim, self.slopes.dtype, self.slopes.requires_grad)
        return self.num_heads, slopes, self.corner

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> ALiBi:
        heads, of_slopes, corner = facts
        slopes = None
        if of_slopes is not None:
            rank, dtype, grad = of_slopes
            shape = (batch, heads)[-rank:]
            slopes = torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
        return cls(heads, slopes, corner, lengths)


def paper_slopes(head: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The slope of each head by the paper: a geometric sequence for the largest power of 2 among the heads, then every
    second number of the sequence for twice as many. Arithmetic alone, so that a kernel can compute it where it is."""
    power = 1 << (operator.index(num_heads).bit_length() - 1)
    first = -8.0 * (head + 1) / power
    rest = -4.0 * (2 * (head - power) + 1) / power
    return torch.exp2(torch.where(head < power, first, rest).to(dtype))
