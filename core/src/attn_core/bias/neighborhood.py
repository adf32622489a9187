"""Neighborhood: on a line, a plane or in space, each query sees the nearest keys of every axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import InputError
from .base import Mask, TileKind
from .causal import Causal
from .whole_numbers import as_int, is_count
from .window import Window

MAX_RANK = 3

#: (extent, kernel_size, stride, dilation, is_causal) of one axis.
Axis = tuple[int, int, int, int, bool]

#: The range `[low, high)` on each axis.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False, init=False)
class Neighborhood(Mask):
    """A query sees a key where it does so on every axis: where that lies in the window around it.

    The tokens are the points of a grid of 1, 2 or 3 axes, the last one fastest: seqlen_q and seqlen_kv are the product
    of the extents. The meaning is that of NATTEN's neighborhood attention, which is no sliding window: at a border the
    window is moved inward, so that without is_causal every query sees `kernel_size` keys of each axis.

    Args:
        extents: points on each axis: an int (one axis), or a tuple of 1 to 3.
        kernel_size: keys in a window, >= 1; where it is even, one more before the query than behind it.
        stride: queries that share one window, 1 to kernel_size. The window is that of their leader: of those from
            `n * stride` on the one at `n * stride + stride // 2`, with is_causal at `n * stride + stride - 1`, or the
            last one of the axis where that lies beyond it.
        dilation: distance between the keys of a window, >= 1; `kernel_size * dilation` must not exceed the extent. The
            points `i`, `i + dilation`, ... are a line of their own, on which windows, strides and borders are counted.
        is_causal: the window ends on its leader, is cut off at the start of the axis, and what lies behind the query
            is masked.

    Each but the first is one value for all axes, or a tuple with one for each.

        Neighborhood(7, kernel_size=3)    ..., is_causal=True    ..., dilation=2    ..., stride=2
        ███····                           █······                █·█·█··            ███····
        ███····                           ██·····                ·█·█·█·            ███····
        ·███···                           ███····                █·█·█··            ··███··
        ··███··                           ·███···                ·█·█·█·            ··███··
        ···███·                           ··███··                ··█·█·█            ····███
        ····███                           ···███·                ·█·█·█·            ····███
        ····███                           ····███                ··█·█·█            ····███

    Raises InputError, naming the axis, for a value of another type or out of bounds; when bound, for lengths that are
    not the product of the extents.
    """

    extents: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    lengths: tuple[int, int] | None = None
    key: tuple[object, ...] = field(init=False, compare=False)

    def __init__(
        self,
        extents: int | Sequence[int],
        *,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        sizes = tuple(map(as_int, extents if isinstance(extents, (tuple, list)) else (extents,)))
        if not 1 <= len(sizes) <= MAX_RANK:
            raise InputError(f"Neighborhood: extents must have 1 to {MAX_RANK} axes, got {len(sizes)}: {extents!r}")
        values = [
            _of_each_axis(name, value, len(sizes))
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        ]
        causal = _of_each_axis("is_causal", is_causal, len(sizes))
        for number, axis in enumerate(zip(sizes, *values, causal)):
            _check(number, *axis)
        self._set((sizes, *values, causal), lengths)

    def _set(self, parameters: tuple[tuple[Any, ...], ...], lengths: tuple[int, int] | None) -> None:
        for name, value in zip(("extents", "kernel_size", "stride", "dilation", "is_causal"), parameters):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "key", (Neighborhood, *parameters, lengths))

    def __repr__(self) -> str:
        text = f"Neighborhood({_shown(self.extents) if len(self.extents) == 1 else self.extents}"
        for name, default in (("kernel_size", None), ("stride", 1), ("dilation", 1), ("is_causal", False)):
            values = getattr(self, name)
            if set(values) != {default}:
                text += f", {name}={_shown(values)}"
        return f"{text})" if self.lengths is None else f"{text}).bind{self.lengths}"

    def bind(self, seqlen_q: int, seqlen_kv: int) -> Neighborhood:
        size = prod(self.extents)
        if seqlen_q != size or seqlen_kv != size:
            raise InputError(
                f"bias: {self!r} has {' * '.join(map(str, self.extents))} = {size} tokens, which must be both lengths,"
                f" got seqlen_q={seqlen_q}, seqlen_kv={seqlen_kv}"
            )
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> Neighborhood:
        return _made((self.extents, self.kernel_size, self.stride, self.dilation, self.is_causal), lengths)

    def facts(self) -> tuple[Any, ...]:
        return *self.extents, *self.kernel_size, *self.stride, *self.dilation, *self.is_causal

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> Neighborhood:
        rank = len(facts) // 5
        return _made(tuple(facts[i * rank : (i + 1) * rank] for i in range(5)), lengths)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """(extent, kernel_size, stride, dilation, is_causal) of each axis."""
        return tuple(zip(self.extents, self.kernel_size, self.stride, self.dilation, self.is_causal))

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept = None
        for axis in reversed(self.axes):
            seen = _sees(q % axis[0], k % axis[0], axis)
            kept = seen if kept is None else kept & seen
            q, k = q // axis[0], k // axis[0]
        assert kept is not None  # there is an axis
        return kept

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        size = prod(self.extents)
        low, high = size, 0
        for box in _boxes(self.extents, q0, min(q1, size)):
            first = last = 0
            for axis, queries in zip(self.axes, box):
                lows, highs = reach(axis, *queries)
                first, last = first * axis[0] + int(lows.min()), last * axis[0] + int(highs.max())
            low, high = min(low, first), max(high, last + 1)
        return (low, high) if low < high else (0, 0)

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        some, every = False, True
        boxes_kv = _boxes(self.extents, k0, k1)
        for box_q in _boxes(self.extents, q0, q1):
            for box_kv in boxes_kv:
                seen = [_seen(axis, *ranges) for axis, *ranges in zip(self.axes, box_q, box_kv)]
                some = some or all(kind != "empty" for kind in seen)
                every = every and all(kind == "full" for kind in seen)
                if some and not every:
                    return "mixed"
        return "full" if some else "empty"

    def pairs(self) -> float:
        self.bound_lengths()
        pairs = 1.0
        for axis in self.axes:  # where a graph is traced, a generator is not taken
            pairs *= _count(*axis)
        return pairs

    def normalize(self) -> Neighborhood | Window | Causal | None:
        lengths = self.bound_lengths()
        axes = [_simplest(*axis) for axis in self.axes if axis[0] > 1]  # on an axis of one point nothing is masked
        if all(extent == kernel and not causal for extent, kernel, _, _, causal in axes):
            return None
        if len(axes) == 1:
            extent, kernel, stride, dilation, causal = axes[0]
            if stride == dilation == 1 and (causal or kernel == 1):  # nothing to move inward at the end of the axis
                if kernel == extent:
                    return Causal("top-left", lengths)
                return Window(kernel - 1, 0, "top-left", lengths)
        return self if tuple(axes) == self.axes else _made(tuple(zip(*axes)), lengths)


def _made(parameters: tuple[tuple[Any, ...], ...], lengths: tuple[int, int] | None) -> Neighborhood:
    """One of values that were checked before."""
    bias = object.__new__(Neighborhood)
    bias._set(parameters, lengths)
    return bias


# What is passed in


def _of_each_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One value for each axis."""
    if not isinstance(value, (tuple, list)):
        return (as_int(value),) * rank
    if len(value) != rank:
        raise InputError(
            f"Neighborhood: {name} must be one value, or one for each of the {rank} axes,"
            f" got {len(value)} values: {value!r}"
        )
    return tuple(map(as_int, value))


def _check(number: int, extent: Any, kernel: Any, stride: Any, dilation: Any, causal: Any) -> None:
    def refuse(what: str) -> NoReturn:
        raise InputError(f"Neighborhood: {what} on axis {number}")

    named = (("extents", extent), ("kernel_size", kernel), ("stride", stride), ("dilation", dilation))
    for name, value in named:
        if not is_count(value, 1):
            refuse(f"{name} must be an int >= 1, got {value!r}")
    if not isinstance(causal, bool):
        refuse(f"is_causal must be True or False, got {causal!r}")
    if kernel * dilation > extent:
        refuse(
            f"a window is larger than the extent: kernel_size={kernel} * dilation={dilation} = {kernel * dilation}"
            f" > {extent}"
        )
    if stride > kernel:
        refuse(f"stride={stride} is larger than kernel_size={kernel}, so that a query might not see itself,")


def _shown(values: tuple[Any, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else values


# The rule of one axis, and what follows from it


def _window(i: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """(line, start, end) for queries `i`: they see the keys `line + dilation * n` with start <= n < end."""
    extent, kernel, stride, dilation, causal = axis
    line, position = i % dilation, i // dilation
    points = (extent - line + dilation - 1) // dilation  # on that line
    behind = stride - 1 if causal else stride // 2
    leader = torch.minimum(position // stride * stride + behind, points - 1)
    if causal:
        return line, (leader - kernel + 1).clamp(min=0), position + 1
    start = torch.minimum((leader - kernel // 2).clamp(min=0), points - kernel)
    return line, start, start + kernel


def _sees(q: Tensor, k: Tensor, axis: Axis) -> Tensor:
    """Where query `q` sees key `k`, both coordinates on the axis."""
    line, start, end = _window(q, axis)
    dilation = axis[3]
    n = k // dilation
    within = (n >= start) & (n < end)
    return within if dilation == 1 else within & (k % dilation == line)


def reach(axis: Axis, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query of `[low, high)` sees."""
    line, start, end = _window(torch.arange(low, high, device="cpu"), axis)
    return line + axis[3] * start, line + axis[3] * (end - 1)


def _seen(axis: Axis, queries: tuple[int, int], keys: tuple[int, int]) -> TileKind:
    """Whether none, all or some of these pairs remain on the axis."""
    dilation = axis[3]
    first, last = reach(axis, *queries)
    before = (keys[0] - first + dilation - 1).clamp(min=0) // dilation  # keys of each window that lie before the range
    upto = (last.clamp(max=keys[1] - 1) - first) // dilation + 1
    count = (upto - before).clamp(min=0)
    if not count.any():
        return "empty"
    return "full" if bool((count == keys[1] - keys[0]).all()) else "mixed"


def _count(extent: int, kernel: int, stride: int, dilation: int, causal: bool) -> int:
    """How many (query, key) pairs remain on the axis; closed form."""
    if not causal:
        return extent * kernel
    longer = extent % dilation  # this many lines have one point more than the others
    longer_count, count = (_causal_count(extent // dilation + more, kernel, stride) for more in (1, 0))
    return longer * longer_count + (dilation - longer) * count


def _causal_count(points: int, kernel: int, stride: int) -> int:
    """The pairs up to the diagonal, less those before the windows' starts, `stride` queries at a time."""
    groups, rest = divmod(points, stride)
    untouched = (kernel - 1) // stride  # groups whose window starts at 0; the n-th ends at stride * (n + 1)
    groups_before = stride * (groups * (groups + 1) - untouched * (untouched + 1)) // 2 - kernel * (groups - untouched)
    return points * (points + 1) // 2 - stride * groups_before - rest * (points - kernel)


def _simplest(extent: int, kernel: int, stride: int, dilation: int, causal: bool) -> Axis:
    """The same window on that axis by the plainest parameters."""
    if kernel == 1:
        return extent, 1, 1, 1, False
    if kernel * dilation == extent:  # one window on each line
        return extent, kernel, 1, dilation, causal
    return extent, kernel, stride, dilation, causal


def _boxes(extents: tuple[int, ...], low: int, high: int) -> list[Box]:
    """The tokens `[low, high)` as boxes: a part of a row, whole rows, a part of a row; and so on for each part."""
    if len(extents) == 1:
        return [((low, high),)] if low < high else []
    row_size = prod(extents[1:])

    def part(row: int) -> Iterator[Box]:
        begin, end = max(low - row * row_size, 0), min(high - row * row_size, row_size)
        return (((row, row + 1), *box) for box in _boxes(extents[1:], begin, end))

    first, last = -(-low // row_size), high // row_size  # whole rows
    if first > last:
        return list(part(last))
    boxes = list(part(first - 1)) if low < first * row_size else []
    if first < last:
        boxes.append(((first, last), *((0, extent) for extent in extents[1:])))
    return boxes + list(part(last)) if last * row_size < high else boxes
