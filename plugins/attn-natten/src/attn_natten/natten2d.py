"""Deprecated: where NATTEN before 0.15 had NeighborhoodAttention2D. Import it from the package itself."""

from __future__ import annotations

import warnings

from .modules import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

warnings.warn(
    "attn_natten.natten2d is deprecated; import NeighborhoodAttention2D from attn_natten",
    DeprecationWarning,
    stacklevel=2,
)
