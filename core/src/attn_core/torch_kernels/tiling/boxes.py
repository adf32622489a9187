"""Neighborhoods, cut into boxes of queries: on every axis, a box sees the keys from its first query's to its last's.

With a dilation, the points at that distance are a grid of their own, on which there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from ...bias import Neighborhood
from ...bias.neighborhood import reach
from .chosen import OWN, Tiles
from .intervals import Stretch, stretches, widened
from .runs import Run
from .sequence import Sequence
from .strips import Across, Strips
from .tables import Part
from .windows import additive, interval_runs

#: Queries of a box on each axis, by how many axes there are. Small boxes see little that none of their queries wants;
#: larger ones have fewer gradients to add up.
FORWARD_BOXES = {2: (2, 8), 3: (2, 2, 8)}
BACKWARD_BOXES = {2: (8, 8), 3: (4, 4, 4)}
#: Elements of the masks of all strips of a run, up to which strips with other masks are run together.
JOINED = 1 << 17


def parts_of(
    mask: Neighborhood, backward: bool, like: Tensor, chosen: Tiles = OWN, *, joined: bool = True
) -> list[Part]:
    """The parts of a neighborhood; each query is in one run of one of them.

    `joined`: strips with other masks, as those at a border, may be in one part.
    """
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
            found += _strips(mask, starts, ranges, own if box is None else box, like, chosen, joined)
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
    joined: bool,
) -> list[Part]:
    sizes = [box_size(size, stride, len(first)) for size, stride, (first, _) in zip(boxes, mask.stride, ranges)]
    along, *across = (stretches(first, end, size) for (first, end), size in zip(ranges, sizes))
    lengths = [len(first) for first, _ in ranges]
    groups: Iterable[Across] = itertools.product(*([(stretch,) for stretch in axis] for axis in across))
    if joined:
        widest = max(tiles.rows * tiles.columns for tiles in along)
        together = tuple(itertools.product(*map(_of_one_shape, across, lengths[1:])))
        if all(_is_small(strips, widest) for strips in together):
            groups = together
    found: list[Part] = []
    for strips in groups:
        queries, keys = prod(axis[0].rows for axis in strips), prod(axis[0].columns for axis in strips)
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


def _of_one_shape(found: list[Stretch], length: int) -> list[tuple[Stretch, ...]]:
    """The stretches of an axis, those with the same rows made as wide as the widest of them."""
    groups = (tuple(group) for _, group in itertools.groupby(found, lambda stretch: stretch.rows))
    return [tuple(widened(each, max(x.columns for x in group), length) for each in group) for group in groups]


def _is_small(strips: Across, widest: int) -> bool:
    """Whether the masks of all strips are, of which each lane gets its own."""
    count = prod(sum(stretch.count for stretch in axis) for axis in strips)
    return count * widest * prod(axis[0].rows * axis[0].columns for axis in strips) <= JOINED


def box_size(size: int, stride: int, extent: int) -> int:
    """So many queries that boxes begin where a group of queries with a common window does."""
    return min(extent, stride * max(1, round(size / stride)))


def _mask(tiles: Stretch, strips: Across, like: Tensor) -> Tensor | None:
    """What remains of a box: what does so on every axis. `[1, 1 or strips, rows, columns]`"""
    kinds = [_kept((tiles, *kind)) for kind in itertools.product(*strips)]
    if all(kind is None for kind in kinds):
        return None
    shape = next(kind.shape for kind in kinds if kind is not None)
    masks = torch.stack([torch.ones(shape, dtype=torch.bool, device="cpu") if x is None else x for x in kinds])
    if len(masks) > 1:
        numbers = torch.arange(len(masks), device="cpu").view(*map(len, strips))
        for axis, stretch in enumerate(strips):
            numbers = numbers.repeat_interleave(torch.tensor([each.count for each in stretch]), axis)
        masks = masks[numbers.flatten()]
    return additive(masks, like)


def _kept(axes: tuple[Stretch, ...]) -> Tensor | None:
    """`[rows, columns]`, True = may attend; None: all of them."""
    if all(axis.keep is None for axis in axes):
        return None
    kept = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis in axes:
        keep = torch.ones(axis.rows, axis.columns, dtype=torch.bool, device="cpu") if axis.keep is None else axis.keep
        kept = (kept[:, None, :, None] & keep[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return kept
