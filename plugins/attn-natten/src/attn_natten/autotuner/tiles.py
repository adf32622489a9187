"""Configurations of `torch/tiled`: the boxes of queries that a neighborhood is cut into, and the batches of boxes.

Small boxes see little that none of their queries wants; large ones are fewer, so that less is copied, launched and, in
the backward, added up. Which wins depends on the window, the heads and the machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from math import ceil, prod
from typing import Any

from attn_core import Neighborhood, Problem
from attn_core.errors import InputError
from attn_core.torch_kernels.tiling.boxes import BACKWARD_BOXES, FORWARD_BOXES, box_size
from attn_core.torch_kernels.tiling.chosen import OWN, Tiles, choose_tiles
from attn_core.torch_kernels.tiling.windows import FORWARD_ROWS

Box = tuple[int, ...]

#: The likely boxes, by the number of axes.
LIKELY_FORWARD: dict[int, tuple[Box, ...]] = {
    1: ((16,), (64,)),
    2: ((1, 8), (4, 4), (4, 8), (2, 16), (8, 8)),
    3: ((1, 2, 8), (1, 4, 8), (2, 2, 4), (2, 4, 4), (2, 4, 8)),
}
LIKELY_BACKWARD: dict[int, tuple[Box, ...]] = {
    1: ((32,), (64,), (128,), (256,)),
    2: ((4, 8), (8, 16), (16, 8), (16, 16)),
    3: ((2, 4, 4), (2, 4, 8), (2, 8, 8), (4, 4, 8)),
}
#: Every size of a box on an axis, by the number of axes, where all are tried.
SIZES = {1: (8, 16, 32, 64, 96, 128, 192, 256, 384), 2: (1, 2, 4, 8, 16, 32), 3: (1, 2, 4, 8)}
#: The bytes of a batch of boxes that are tried beside the kernel's own.
FORWARD_BATCHES = (1 << 18, 1 << 22, 1 << 24)
BACKWARD_BATCHES = (1 << 20, 1 << 24)
#: What the kernel takes where nothing is chosen; in the backward on a line, that depends on the window.
OWN_FORWARD: dict[int, Box] = {1: (FORWARD_ROWS,), **FORWARD_BOXES}
OWN_BACKWARD: dict[int, Box] = BACKWARD_BOXES
#: Queries of a box, and pairs of queries and keys, that a box has at most.
MOST_QUERIES, MOST_PAIRS = 512, 1 << 20


class Tiled:
    """The family of `torch/tiled`; its configurations are the core's `Tiles`."""

    def configurations(self, problem: Problem, *, backward: bool, thorough: bool) -> list[Tiles]:
        """Those to try, the kernel's own first; likely ones, or with `thorough` every box in every batch."""
        mask = problem.bias
        assert isinstance(mask, Neighborhood)
        rank = len(mask.extents)
        own = (OWN_BACKWARD if backward else OWN_FORWARD).get(rank)
        batches = BACKWARD_BATCHES if backward else FORWARD_BATCHES
        if not thorough:
            likely = (LIKELY_BACKWARD if backward else LIKELY_FORWARD)[rank]
            boxes = different(mask, likely, own)
            return [OWN, *(Tiles(box=box) for box in boxes), *(Tiles(batch_bytes=bound) for bound in batches)]
        every: list[Box | None] = [None, *different(mask, itertools.product(SIZES[rank], repeat=rank), own)]
        return [Tiles(box=box, batch_bytes=bound) for bound in (None, *batches) for box in every]

    def within(self, forward: Tiles | None, backward: Tiles | None) -> AbstractContextManager[None]:
        return choose_tiles(forward=forward, backward=backward)

    def written(self, configuration: Tiles) -> dict[str, Any]:
        """The same by name, without what is the kernel's own."""
        return {name: value for name, value in asdict(configuration).items() if value is not None}

    def read(self, written: dict[str, Any]) -> Tiles:
        known = {field.name for field in fields(Tiles)}
        for name in written:
            if name not in known:
                raise InputError(f"tiles of torch/tiled: takes {', '.join(sorted(known))}, got {name!r}")
        box = written.get("box")
        return Tiles(**{**written, "box": tuple(box) if isinstance(box, list) else box})

    def from_words(self, words: dict[str, Any]) -> Tiles:
        odd = [name for name in words if name != "q_tile"]
        if odd:
            raise InputError(f"takes q_tile alone, whose keys are those that it sees; got {odd[0]}={words[odd[0]]!r}")
        return Tiles(box=words["q_tile"])


TILED = Tiled()


def different(mask: Neighborhood, boxes: Iterable[Box], own: Box | None) -> Iterator[Box]:
    """Those that come to something else on the axes of `mask` than the kernel's `own`, and than each other; and none
    that is too large."""

    def on_axes(box: Box) -> Box:
        return tuple(
            box_size(size, stride, ceil(extent / dilation))
            for size, (extent, _, stride, dilation, _) in zip(box, mask.axes)
        )

    seen = set() if own is None else {on_axes(own)}
    for box in boxes:
        sizes = on_axes(box)
        keys = prod(min(size + kernel, extent) for size, (extent, kernel, *_) in zip(sizes, mask.axes))
        queries = prod(sizes)
        if sizes not in seen and queries <= MOST_QUERIES and queries * keys <= MOST_PAIRS:
            seen.add(sizes)
            yield sizes
