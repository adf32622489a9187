"""Deprecated: where NATTEN before 0.15 had NeighborhoodAttention1D. Import it from the package itself."""

from __future__ import annotations

import warnings

from .modules import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]

warnings.warn(
    "attn_natten.natten1d is deprecated; import NeighborhoodAttention1D from attn_natten",
    DeprecationWarning,
    stacklevel=2,
)
