"""RelPosTable: a learned number for each head and offset between query and key."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .neighborhood import MAX_RANK
from .score import Score
from .whole_numbers import as_int, is_count


@dataclass(frozen=True, repr=False, eq=False, init=False)
class RelPosTable(Score):
    """Adds `table[h, offset]`, where offset is that of the key from the query on every axis of a grid.

    The tokens are the points of a grid of 1 to 3 axes, the last one fastest; seqlen_q and seqlen_kv are the product of
    the extents.

    Args:
        table: `[num_heads, 2 * r0 - 1, ...]`, floating, one dimension per axis, of odd sizes: the entry `r - 1` of an
            axis is for a key at the query's own place, those before it for keys before. A gradient flows to it.
        extents: points on each axis: an int (one axis), or a tuple of 1 to 3.
        dilation: distance of the keys that neighboring entries stand for; one for all axes, or a tuple.

    Nothing is added for a key that lies beyond the table or, with a dilation, between its entries.

    As NATTEN's relative positional bias, beside `Neighborhood(extents, kernel_size=r, dilation=...)`, and as Swin's
    (arXiv:2103.14030), whose table `from_swin` converts. Raises InputError, naming the axis, for a table or values that
    do not fit; InputTypeError for a table that is not floating.
    """

    table: Tensor
    extents: tuple[int, ...]
    dilation: tuple[int, ...]
    lengths: tuple[int, int] | None = None

    def __init__(
        self,
        table: Tensor,
        extents: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        sizes = tuple(map(as_int, extents if isinstance(extents, (tuple, list)) else (extents,)))
        dilations = tuple(map(as_int, dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(sizes)))
        _check_floating("RelPosTable", table)
        if not 1 <= len(sizes) <= MAX_RANK:
            raise InputError(f"RelPosTable: extents must have 1 to {MAX_RANK} axes, got {extents!r}")
        if table.ndim != 1 + len(sizes) or len(dilations) != len(sizes):
            raise InputError(
                f"RelPosTable: extents {sizes} have {len(sizes)} axes, so table must be"
                f" [num_heads{', odd size' * len(sizes)}] and dilation one value or {len(sizes)};"
                f" got table {list(table.shape)}, dilation={dilation!r}"
            )
        for axis, (extent, step, size) in enumerate(zip(sizes, dilations, table.shape[1:])):
            for name, number in (("extents", extent), ("dilation", step)):
                if not is_count(number, 1):
                    raise InputError(f"RelPosTable: {name} must be an int >= 1, got {number!r} on axis {axis}")
            if size % 2 != 1:
                raise InputError(
                    f"RelPosTable: table has an entry for each offset from -(r - 1) to r - 1, so its size must be odd,"
                    f" got {size} on axis {axis}"
                )
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "extents", sizes)
        object.__setattr__(self, "dilation", dilations)
        object.__setattr__(self, "lengths", lengths)

    @classmethod
    def from_swin(cls, table: Tensor, window: tuple[int, int]) -> RelPosTable:
        """From Swin's `relative_position_bias_table`, `[(2 * height - 1) * (2 * width - 1), num_heads]`.

        Its entries are for the query's place less the key's, so both axes are turned around. Raises InputTypeError for
        a table that is not floating, InputError for a window that is no pair, or another number of entries.
        """
        sizes = tuple(map(as_int, window)) if isinstance(window, (tuple, list)) else ()
        if len(sizes) != 2 or not all(is_count(n, 1) for n in sizes):
            raise InputError(f"RelPosTable.from_swin: window must be (height, width), ints >= 1, got {window!r}")
        _check_floating("RelPosTable.from_swin", table)
        height, width = sizes
        if table.ndim != 2 or table.shape[0] != (2 * height - 1) * (2 * width - 1):
            raise InputError(
                f"RelPosTable.from_swin: a window of {height} x {width} has {(2 * height - 1) * (2 * width - 1)}"
                f" entries, got table {list(table.shape)}"
            )
        turned = table.T.reshape(-1, 2 * height - 1, 2 * width - 1).flip(1, 2)
        return cls(turned, sizes)

    def __repr__(self) -> str:
        grad = " requires_grad" if self.table.requires_grad else ""
        extents = self.extents[0] if len(self.extents) == 1 else self.extents
        dilation = "" if set(self.dilation) == {1} else f", dilation={self.dilation}"
        text = f"RelPosTable({list(self.table.shape)}{grad}, {extents}{dilation})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return 1, self.table.shape[0]

    def bind(self, seqlen_q: int, seqlen_kv: int) -> RelPosTable:
        size = prod(self.extents)
        if seqlen_q != size or seqlen_kv != size:
            raise InputError(
                f"bias: {self!r} has {' * '.join(map(str, self.extents))} = {size} tokens, which must be both lengths,"
                f" got seqlen_q={seqlen_q}, seqlen_kv={seqlen_kv}"
            )
        return self.at((seqlen_q, seqlen_kv))

    def added(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        entry = [h]
        reached = None
        for extent, dilation, size in list(zip(self.extents, self.dilation, self.table.shape[1:]))[::-1]:
            offset = k % extent - q % extent
            middle = size // 2
            place = torch.div(offset, dilation, rounding_mode="floor") + middle
            within = (place >= 0) & (place < size)
            if dilation > 1:
                within = within & (offset % dilation == 0)
            reached = within if reached is None else reached & within
            entry.insert(1, place.clamp(0, size - 1))
            q, k = q // extent, k // extent
        assert reached is not None  # there is an axis
        return torch.where(reached, self.table[tuple(entry)].to(dtype), 0.0)


def _check_floating(who: str, table: object) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise InputTypeError(f"{who}: table must be a floating tensor, got {got}")
