"""Parameters, each with a value on every axis, and the neighborhood that they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from attn_core import Neighborhood
from attn_core.errors import InputError
from attn_core.tracing import constant

from ..errors import ConstraintError
from ..switches.strict import are_strict_checks_enabled

#: A value for all axes, or one for each.
PerAxis = int | Sequence[int]
CausalPerAxis = bool | Sequence[bool]

#: What the axes are called.
SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}

_INTEGERS = (int, torch.SymInt)  # the latter where a graph is traced


def of_each_axis(name: str, value: Any, rank: int, kind: type = int) -> tuple[Any, ...]:
    """`value` as a tuple of `rank`: an int (with `kind=bool`: a bool), or a tuple or list with one for each axis.

    Raises InputError for another type or length. A bool is no int.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if len(values) != rank or not all(_is_a(kind, each) for each in values):
        one, many = ("True or False", "bools") if kind is bool else ("an int", "ints")
        raise InputError(f"{name}: takes {one}, or a tuple of {rank} {many}, one for each axis; got {value!r}")
    return values


def _is_a(kind: type, value: object) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def neighborhood(
    spatial: Sequence[int],
    kernel_size: PerAxis,
    *,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis | None = False,
) -> Neighborhood:
    """The core's bias for these parameters.

    Args:
        spatial: tokens on each axis, 1 to 3 of them.
        kernel_size: > 1; even sizes too, with one key more before the query than behind it.
        stride: 1 to kernel_size; None is 1.
        dilation: >= 1, `kernel_size * dilation` at most the axis; None is 1.
        is_causal: None is False.

    Each but the first is one value, or one for each axis.

    Raises:
        InputError: another type, or another number of values.
        ConstraintError: out of bounds; with the axis and the numbers. Even sizes too after `use_strict_checks()`.
    """
    extents = tuple(spatial)
    if len(extents) not in SPATIAL:
        raise ConstraintError(f"spatial: takes 1 to 3 axes, got {len(extents)}: {extents}")
    kernels, strides, dilations, causal = window(
        len(extents), kernel_size, stride=stride, dilation=dilation, is_causal=is_causal
    )
    for axis, (extent, kernel, step) in enumerate(zip(extents, kernels, dilations)):
        if kernel * step > extent:
            called = f"{SPATIAL[len(extents)][axis]} (axis {axis})"
            raise ConstraintError(
                f"kernel_size, dilation: each axis must be at least kernel_size * dilation; {called} is {extent}, with"
                f" kernel_size={kernel} * dilation={step} = {kernel * step}"
            )
    return Neighborhood(extents, kernel_size=kernels, stride=strides, dilation=dilations, is_causal=causal)


def window(
    rank: int,
    kernel_size: PerAxis,
    *,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis | None = False,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """(kernel_size, stride, dilation, is_causal), each with `rank` values: all that can be said without a tensor.

    Takes and raises what `neighborhood` does.
    """
    kernels = of_each_axis("kernel_size", kernel_size, rank)
    strides = of_each_axis("stride", 1 if stride is None else stride, rank)
    dilations = of_each_axis("dilation", 1 if dilation is None else dilation, rank)
    causal = of_each_axis("is_causal", False if is_causal is None else is_causal, rank, bool)
    for axis, (kernel, hop, step) in enumerate(zip(kernels, strides, dilations)):
        if kernel <= 1:
            raise ConstraintError(
                f"kernel_size: kernel size must be greater than 1 on each axis, got {kernel} on axis {axis}"
            )
        if kernel % 2 == 0 and are_strict_checks_enabled():
            raise ConstraintError(
                f"kernel_size: kernel size must be an odd number greater than 1, got {kernel} on axis {axis}; even"
                " sizes are taken unless use_strict_checks() is on"
            )
        if step < 1:
            raise ConstraintError(f"dilation: must be an int >= 1, got {step} on axis {axis}")
        if not 1 <= hop <= kernel:
            raise ConstraintError(f"stride: must be from 1 to kernel_size={kernel}, got {hop} on axis {axis}")
    return kernels, strides, dilations, causal


def causal_alias(is_causal: Any, is_casual: Any, *, stacklevel: int = 3) -> Any:
    """`is_causal`, or what was passed under the misspelled name of NATTEN's front page, with a DeprecationWarning.

    None, and `is_causal=False`, which is the default of every call, count as not given. `stacklevel` is as for
    `warnings.warn`: 3 points at the caller of the function that calls this.

    Raises InputError where both are given.
    """
    if is_casual is None:
        return is_causal
    if is_causal is not None and is_causal is not False:
        raise InputError(
            f"is_causal, is_casual: two names of one argument, takes is_causal alone; got is_causal={is_causal!r} and"
            f" is_casual={is_casual!r}"
        )
    _say_misspelled(stacklevel + 1)
    return is_casual


@constant
def _say_misspelled(stacklevel: int) -> None:
    warnings.warn("is_casual is a misspelling of is_causal, and deprecated", DeprecationWarning, stacklevel=stacklevel)
