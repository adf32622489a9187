"""The relative positional bias in the slots of a neighborhood, and the sums that are its gradient.

On each axis, key j of query i reads entry `(j - i) / dilation + kernel_size - 1`. The keys of a window are neighbors on
their line, so a query reads as many entries in a row, from its *offset* on, which is from 0 to kernel_size - 1:

    kernel_size=3    ███··   offset 2        entries 2 3 4
                     ███··   offset 1        entries 1 2 3
                     ·███·   offset 1
                     ··███   offset 1
                     ··███   offset 0        entries 0 1 2

No axis is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .axis import lines
from .products import Window
from .scratch import wide
from .shapes import apart


def slots(rpb: Tensor, spatial: Sequence[int], window: Window) -> Tensor:
    """`[num_heads, *spatial, width]` of `[num_heads, 2 * kernel_size - 1, ...]`."""
    found = rpb
    for axis, kernel in enumerate(window.kernel):
        found = found.unfold(1 + axis, kernel, 1)
    for axis, of_axis in enumerate(zip(spatial, window.kernel, window.dilation)):
        found = found.index_select(1 + axis, _offsets_on(rpb.device, *of_axis))
    return found.flatten(1 + len(spatial))


def sums(attn: Tensor, window: Window) -> Tensor:
    """`[num_heads, 2 * kernel_size - 1, ...]`: each entry's sum over the slots of `attn`, `[num_heads, *spatial,
    width]`, that read it. In one order: the same from run to run."""
    rank, spatial = len(window.kernel), attn.shape[1:-1]
    found = apart(attn.to(wide(attn)), -1, window.kernel)
    for axis, of_axis in enumerate(zip(spatial, window.kernel, window.dilation)):
        of_queries = [_sum_of(found, 1 + axis, queries) for queries in _queries(*of_axis)]
        found = torch.stack(of_queries, 1 + axis)  # one for each offset
    for axis, kernel in enumerate(window.kernel):
        shape = (*found.shape[: 1 + axis], 2 * kernel - 1, *found.shape[2 + axis : 1 + rank], *found.shape[2 + rank :])
        entries = found.new_zeros(shape)
        by_offset = found.movedim(1 + rank, 2 + axis)  # the slots of this axis beside its offsets
        for offset in range(kernel):
            entries.narrow(1 + axis, offset, kernel).add_(by_offset.select(1 + axis, offset))
        found = entries
    return found.to(attn.dtype)


def _sum_of(grid: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    if not places:
        return grid.narrow(dim, 0, 0).sum(dim)
    if places[-1] - places[0] == len(places) - 1:
        return grid.narrow(dim, places[0], len(places)).sum(dim)
    return grid.index_select(dim, torch.tensor(places, device=grid.device)).sum(dim)


@lru_cache(maxsize=256)
def _offsets(extent: int, kernel: int, dilation: int) -> list[int]:
    """Of each query of an axis."""
    found = [0] * extent
    for line in lines(extent, dilation):
        for point in range(line.points):
            start = min(max(point - kernel // 2, 0), line.points - kernel)
            first = line.first + dilation * point
            found[first : first + line.count] = [start - point + kernel - 1] * line.count
    return found


@lru_cache(maxsize=256)
def _offsets_on(device: torch.device, *of_axis: int) -> Tensor:
    return torch.tensor(_offsets(*of_axis), device=device)


@lru_cache(maxsize=256)
def _queries(extent: int, kernel: int, dilation: int) -> list[list[int]]:
    """The queries of each offset, ascending."""
    found: list[list[int]] = [[] for _ in range(kernel)]
    for query, offset in enumerate(_offsets(extent, kernel, dilation)):
        found[offset].append(query)
    return found
