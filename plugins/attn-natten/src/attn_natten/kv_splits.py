"""Into how many parts the backward pass of fused attention splits keys and values: NATTEN's arithmetic.

Parts are worked at in parallel, which pays where batch and heads alone leave a GPU idle. At most one part per tile of
keys; at most so many in all that the grid of thread blocks stays within a bound, which `set_memory_usage_preference`
chooses. Parts add to one gradient in no fixed order, so a deterministic mode allows one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .arguments import of_each_axis
from .errors import ConstraintError
from .switches.deterministic import must_be_deterministic
from .switches.kv_parallelism import is_kv_parallelism_in_fused_na_enabled
from .switches.memory import MemoryUsagePreference, get_memory_usage_preference

#: Tiles of a kernel that is not told otherwise, of queries and of keys: axes -> tokens of a tile on each axis.
DEFAULT_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}

#: Thread blocks, over batch, heads, dilation and splits. The last is the limit of CUDA.
MAX_GRID = {
    MemoryUsagePreference.Default: 4096,
    MemoryUsagePreference.Strict: 1024,
    MemoryUsagePreference.Unrestricted: 65535,
}


def kv_splits(
    spatial: Sequence[int],
    kv_tile: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] = 1,
    batch: int = 1,
    num_heads: int = 1,
    *,
    asked: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Parts on each axis.

        kv_splits((56, 56), batch=1, num_heads=3)    (7, 7)
        kv_splits((56, 56), batch=64, num_heads=12)  (2, 2), "strict" (1, 1), "unrestricted" (7, 7)

    (with KV parallelism on; off, or in a deterministic mode, of this package or torch's, 1 on each axis.)

    Args:
        spatial: tokens on each of 1 to 3 axes.
        kv_tile: tokens of a tile of keys, one value or one for each axis; None: 64, 8 x 8 or 4 x 4 x 4.
        dilation: of the neighborhood, one value or one for each axis.
        batch, num_heads: which the grid is shared with.
        asked: parts that the caller wants, whatever the switches say: at most as many as there are tiles, and 1 in a
            deterministic mode.

    Raises InputError for a type or a number of values, ConstraintError for a number < 1.
    """
    rank = len(spatial)
    if rank not in DEFAULT_TILES:
        raise ConstraintError(f"spatial: takes 1 to 3 axes, got {rank}: {tuple(spatial)}")
    extents = _positive("spatial", tuple(spatial), rank)
    tiles = _positive("kv_tile", DEFAULT_TILES[rank] if kv_tile is None else kv_tile, rank)
    steps = _positive("dilation", dilation, rank)
    (images,), (heads,) = _positive("batch", batch, 1), _positive("num_heads", num_heads, 1)
    wanted = None if asked is None else _positive("asked", asked, rank)
    if must_be_deterministic():
        return (1,) * rank
    most = max_kv_splits(extents, tiles, steps)
    if wanted is not None:
        return tuple(min(each, limit) for each, limit in zip(wanted, most))
    if not is_kv_parallelism_in_fused_na_enabled():
        return (1,) * rank
    allowed = max(1, MAX_GRID[get_memory_usage_preference()] // (images * heads * prod(steps)))
    return most if prod(most) <= allowed else _reduced(most, allowed)


def max_kv_splits(spatial: tuple[int, ...], kv_tile: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """The tiles of keys on each axis, of the longest of the `dilation` lines that the axis consists of."""
    lines = tuple(_divided(extent, step) for extent, step in zip(spatial, dilation))
    return tuple(_divided(line, tile) for line, tile in zip(lines, kv_tile))


def _reduced(most: tuple[int, ...], allowed: int) -> tuple[int, ...]:
    """At most `allowed` in all: the first axis gets a part of them (all, a half, a third), the next what is left."""
    splits: tuple[int, ...] = ()
    left = allowed // len(most)
    for limit in most:
        splits += (max(1, min(left, limit)),)
        left = allowed // prod(splits)
    return splits


def _divided(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return (count + size - 1) // size


def _positive(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = of_each_axis(name, value, rank)
    if min(values) < 1:
        raise ConstraintError(f"{name}: must be >= 1, got {value!r}")
    return values
