"""Deprecated: where NATTEN before 0.15 had NeighborhoodAttention3D. Import it from the package itself."""

from __future__ import annotations

import warnings

from .modules import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]

warnings.warn(
    "attn_natten.natten3d is deprecated; import NeighborhoodAttention3D from attn_natten",
    DeprecationWarning,
    stacklevel=2,
)
