"""Neighborhoods, cut into boxes of queries: on every axis, a box sees the keys from its first query's to its last's.

With a dilation, the points at that distance are a grid of their own, on which there is none.
"""

from __future__ import annotations

import itertools
from math import prod

import torch
from torch import Tensor

from ...bias import Neighborhood
from ...bias.neighborhood import reach
from .chosen import OWN, Tiles
from .intervals import Stretch, stretches
from .runs import Run
from .sequence import Sequence
from .strips import Strips
from .tables import Part
from .windows import additive, interval_runs

#: Queries of a box on each axis, by how many axes there are. Small boxes see little that none of their queries wants;
#: larger ones have fewer gradients to add up.
FORWARD_BOXES = {2: (2, 8), 3: (2, 2, 8)}
BACKWARD_BOXES = {2: (8, 8), 3: (4, 4, 4)}


def parts_of(mask: Neighborhood, backward: bool, like: Tensor, chosen: Tiles = OWN) -> list[Part]:
    """The parts of a neighborhood; each query is in one run of one of them."""
    found: list[Part] = []
    box = chosen.box if chosen.box is not None and len(chosen.box) == len(mask.axes) else None
    for starts in itertools.product(*map(range, mask.dilation)):
        ranges = []
        for (extent, kernel, stride, dilation, causal), start in zip(mask.axes, starts):
            points = -(-(extent - start) // dilation)
            first, last = reach((points, kernel, stride, 1, causal), 0, points)
            ranges.append((first, last + 1))
        if len(ranges) == 1:
            rows = None if box is None else box_size(box[0], mask.stride[0], len(ranges[0][0]))
            runs = interval_runs(*ranges[0], backward, like, rows)
            found.append(Sequence(_in_batches(runs, chosen), starts[0], mask.dilation[0]))
        else:
            own = (BACKWARD_BOXES if backward else FORWARD_BOXES)[len(ranges)]
            found += _strips(mask, starts, ranges, own if box is None else box, like, chosen)
    return found


def _in_batches(runs: list[Run], chosen: Tiles) -> tuple[Run, ...]:
    """The runs with the bound of a batch that is chosen for them."""
    if chosen.batch_bytes is None:
        return tuple(runs)
    return tuple(run._replace(batch_bytes=chosen.batch_bytes) for run in runs)


def _strips(
    mask: Neighborhood,
    starts: tuple[int, ...],
    ranges: list[tuple[Tensor, Tensor]],
    boxes: tuple[int, ...],
    like: Tensor,
    chosen: Tiles,
) -> list[Part]:
    sizes = [box_size(size, stride, len(first)) for size, stride, (first, _) in zip(boxes, mask.stride, ranges)]
    along, *across = (stretches(first, end, size) for (first, end), size in zip(ranges, sizes))
    found: list[Part] = []
    for strips in itertools.product(*across):
        queries, keys = prod(strip.rows for strip in strips), prod(strip.columns for strip in strips)
        runs = [
            Run(
                tiles.q0 * queries,
                tiles.k0 * keys,
                tiles.rows * queries,
                tiles.columns * keys,
                tiles.count,
                tiles.rows * queries,
                tiles.k_step * keys,
                mask=_mask(tiles, strips, like),
            )
            for tiles in along
        ]
        in_batches = _in_batches(runs, chosen)
        found.append(Strips(mask.extents, starts, mask.dilation, strips, in_batches, chosen.strip_bytes))
    return found


def box_size(size: int, stride: int, extent: int) -> int:
    """So many queries that boxes begin where a group of queries with a common window does."""
    return min(extent, stride * max(1, round(size / stride)))


def _mask(tiles: Stretch, strips: tuple[Stretch, ...], like: Tensor) -> Tensor | None:
    """What remains of a box: what does so on every axis."""
    axes = (tiles, *strips)
    if all(axis.keep is None for axis in axes):
        return None
    kept = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis in axes:
        keep = torch.ones(axis.rows, axis.columns, dtype=torch.bool, device="cpu") if axis.keep is None else axis.keep
        kept = (kept[:, None, :, None] & keep[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return additive(kept, like)
