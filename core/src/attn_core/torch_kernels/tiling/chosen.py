"""Tiles of neighborhoods that a caller chooses, in place of the kernel's own: a door for autotuners.

    with choose_tiles(forward=Tiles(box=(4, 8)), backward=Tiles(box=(8, 16))):
        out = attention(query, key, value, Neighborhood((56, 56), kernel_size=7))
    out.sum().backward()  # in the tiles that were chosen for its forward

What is chosen is looked at in each eager call, and is part of the key under which a cut mask is kept, so that nothing
is left of it behind the scope. Which kernel runs a call is not decided by it; graphs keep the kernel's own tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from ...bias.neighborhood import MAX_RANK
from ...errors import InputError


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How `torch/tiled` cuts a neighborhood, in one direction; what is None is the kernel's own.

    Results of different tiles are equal but for rounding.

    Args:
        box: queries of a tile, on each axis that has more than one point; neighborhoods of another number of such axes
            are cut as the kernel does. With a stride, it is rounded so that a box begins where queries begin to share
            a window; on no axis it is larger than that is.
        batch_bytes: bytes of results that a batch of tiles may have; of one tile at least.
        strip_bytes: bytes of operands that are copied into strips at a time, on two and three axes; of one strip and
            head at least.

    Raises InputError, naming the argument, for what is no int >= 1, and for another number of axes than 1 to 3.
    """

    box: tuple[int, ...] | None = None
    batch_bytes: int | None = None
    strip_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.box is not None and (not isinstance(self.box, tuple) or not 1 <= len(self.box) <= MAX_RANK):
            raise InputError(f"Tiles: box must be a tuple of 1 to {MAX_RANK} ints, got {self.box!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and (type(number) is not int or number < 1):
                    raise InputError(f"Tiles: {field.name} must be of ints >= 1, got {value!r}")


#: The kernel's own in every respect.
OWN = Tiles()


class Chosen(NamedTuple):
    """What is chosen for calls, forward and backward."""

    forward: Tiles = OWN
    backward: Tiles = OWN


#: None where nothing is chosen: the one thing that calls outside of a scope look at.
_chosen: ContextVar[Chosen | None] = ContextVar("attn_chosen_tiles", default=None)

#: What calls here and now are to be cut into.
chosen = _chosen.get


@contextmanager
def choose_tiles(*, forward: Tiles | None = None, backward: Tiles | None = None) -> Iterator[None]:
    """Within it, `torch/tiled` cuts neighborhoods into these tiles, in eager calls of this task.

    A backward goes by the scope that its forward was called in. Of scopes within each other the innermost counts, also
    for what it leaves to the kernel. Raises InputError for what is no `Tiles`.
    """
    for name, tiles in (("forward", forward), ("backward", backward)):
        if tiles is not None and not isinstance(tiles, Tiles):
            raise InputError(f"choose_tiles: {name} must be Tiles, got {tiles!r}")
    if torch.compiler.is_dynamo_compiling():  # which takes no ContextVar; what it traces keeps the kernel's own
        yield
        return
    token = _chosen.set(Chosen(*(OWN if tiles is None or tiles == OWN else tiles for tiles in (forward, backward))))
    try:
        yield
    finally:
        _chosen.reset(token)
