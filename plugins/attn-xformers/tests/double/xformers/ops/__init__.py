"""Operations: only attention."""

from . import fmha

__all__ = ["fmha"]
