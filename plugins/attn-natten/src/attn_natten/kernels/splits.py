"""What the switches say of KV parallelism, as options of NATTEN's functions.

Nothing where no switch was thrown: NATTEN keeps a default of its own then. It hands a window that is the whole sequence
to its dense attention, so that one is told, too.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ..kv_splits import kv_splits
from ..switches.deterministic import are_deterministic_algorithms_enabled
from ..switches.kv_parallelism import is_kv_parallelism_asked_about


def of_fna(
    backend: str, extents: tuple[int, ...], dilation: tuple[int, ...], batch: int, num_heads: int
) -> dict[str, Any]:
    """`backward_kv_splits` of na1d, na2d or na3d by that backend, one for each axis."""
    if not _is_told(backend):
        return {}
    return {"backward_kv_splits": kv_splits(extents, None, dilation, max(batch, 1), num_heads)}


def of_fmha(backend: str, extents: tuple[int, ...], batch: int, num_heads: int) -> dict[str, Any]:
    """`backward_kv_splits` of attention by that backend, a number; `extents` of the keys."""
    if not _is_told(backend):
        return {}
    return {"backward_kv_splits": kv_splits((max(prod(extents), 1),), None, 1, max(batch, 1), num_heads)[0]}


def _is_told(backend: str) -> bool:
    """Whether it is a backend that splits, and anybody said whether it may."""
    if not backend.startswith("cutlass-"):
        return False
    return is_kv_parallelism_asked_about() or are_deterministic_algorithms_enabled()
