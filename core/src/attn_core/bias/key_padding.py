"""KeyPadding: the first `lengths[b]` keys of batch entry b exist, the rest is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import Mask, Rule
from .whole_numbers import is_readable, whole_numbers


@dataclass(frozen=True, repr=False, eq=False, init=False)
class KeyPadding(Mask):
    """Key k of batch entry b exists where `k < seqlens[b]`; what lies behind may be anything, NaN too.

    Args:
        seqlens: valid keys of each batch entry, `[batch]`: an integer tensor (on any device) or a sequence of ints.

        KeyPadding([3, 5]) on 2 queries, 5 keys
        ███··   batch entry 0
        ███··
        █████   batch entry 1
        █████

    Raises InputTypeError for anything but integers, InputError for another rank, or, when bound, for a length outside
    [0, seqlen_kv] (checked where that needs no wait for a device).
    """

    seqlens: Tensor
    lengths: tuple[int, int] | None = None

    def __init__(self, seqlens: Tensor | Sequence[int], lengths: tuple[int, int] | None = None) -> None:
        if isinstance(seqlens, Tensor) and seqlens.dtype is torch.bool:
            raise InputTypeError(
                "KeyPadding: seqlens counts keys, so it must be an integer tensor, got torch.bool"
                " (a boolean [batch, seqlen_kv] mask goes in as TensorBias(mask[:, None, None, :]))"
            )
        object.__setattr__(self, "seqlens", whole_numbers("KeyPadding", "seqlens", seqlens, 1))
        object.__setattr__(self, "lengths", lengths)

    def __repr__(self) -> str:
        shown = self.seqlens.tolist() if self.seqlens.device.type == "cpu" else f"<{self.seqlens.device}>"
        text = f"KeyPadding({shown})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def key(self) -> tuple[object, ...]:
        return KeyPadding, type(self.seqlens), self.seqlens.shape, self.seqlens.dtype, self.seqlens.device, self.lengths

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return self.seqlens.shape[0], 1

    @property
    def device(self) -> torch.device | None:
        """None: the lengths are few, and go where they are needed."""
        return None

    def bind(self, seqlen_q: int, seqlen_kv: int) -> KeyPadding:
        self._check_rebind(seqlen_q, seqlen_kv)
        if is_readable(self.seqlens):
            for length in self.seqlens.tolist():
                if not 0 <= length <= seqlen_kv:
                    raise InputError(
                        f"bias: KeyPadding lengths must lie in [0, seqlen_kv={seqlen_kv}], got {self.seqlens.tolist()}"
                    )
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> KeyPadding:
        bias = object.__new__(KeyPadding)  # what is held was checked when it came in
        object.__setattr__(bias, "seqlens", self.seqlens)
        object.__setattr__(bias, "lengths", lengths)
        return bias

    def facts(self) -> tuple[Any, ...]:
        return (self.seqlens.dtype,)

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> KeyPadding:
        return cls(torch.empty(batch, dtype=facts[0], device="meta"), lengths)

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k < self.seqlens.to(k.device)[b]

    def rule(self, device: torch.device | str) -> Rule:
        seqlens = self.seqlens.to(device)
        return lambda b, h, q, k: k < seqlens[b]

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor:
        seqlen_kv = self.bound_lengths()[1]
        seqlens = self.seqlens if device is None else self.seqlens.to(device)
        return torch.arange(seqlen_kv, device=seqlens.device) < seqlens[:, None]
