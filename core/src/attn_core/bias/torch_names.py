"""The names of `torch.nn.attention.bias`, for code that has them: they make the core's own values.

torch's `CausalBias` is a tensor whose shape and contents mean nothing; what is made here holds no tensor, and does not
fit operands of other lengths.
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import InputError
from .causal import Causal
from .whole_numbers import as_int, is_count


class CausalVariant(IntEnum):
    """The corner of a causal mask: UPPER_LEFT is "top-left", LOWER_RIGHT is "bottom-right"."""

    UPPER_LEFT = 1
    LOWER_RIGHT = 2


def causal_upper_left(seqlen_q: int, seqlen_kv: int, /) -> Causal:
    """`Causal("top-left")` for these lengths. Raises InputError for what is no length."""
    return CausalBias(CausalVariant.UPPER_LEFT, seqlen_q, seqlen_kv)


def causal_lower_right(seqlen_q: int, seqlen_kv: int, /) -> Causal:
    """`Causal("bottom-right")` for these lengths. Where seqlen_q is the larger, the first queries have no key: their
    output is 0. Raises InputError for what is no length."""
    return CausalBias(CausalVariant.LOWER_RIGHT, seqlen_q, seqlen_kv)


def CausalBias(variant: CausalVariant | int, seq_len_q: int, seq_len_kv: int) -> Causal:  # noqa: N802  (torch's name)
    """The causal mask of a variant, this one or torch's. Raises InputError for another, or what is no length."""
    try:
        known = CausalVariant(variant)
    except ValueError:
        names = " or ".join(f"CausalVariant.{each.name}" for each in CausalVariant)
        raise InputError(f"variant: must be {names}, got {variant!r}") from None
    lengths = as_int(seq_len_q), as_int(seq_len_kv)
    for name, length in zip(("seq_len_q", "seq_len_kv"), lengths):
        if not is_count(length):
            raise InputError(f"{name}: must be an int >= 0, got {length!r}")
    return Causal("top-left" if known is CausalVariant.UPPER_LEFT else "bottom-right").bind(*lengths)
