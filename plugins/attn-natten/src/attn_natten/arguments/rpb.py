"""The relative positional bias: `[num_heads, 2 * kernel_size - 1, ...]`, one dimension for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_core.errors import InputError, InputTypeError
from torch import Tensor

from ..errors import ConstraintError, UnsupportedError
from .operands import has_tangents, shape_of


def check_rpb_is_possible(kernel_size: Sequence[int], is_causal: Sequence[bool]) -> None:
    """Raises UnsupportedError for a causal axis, ConstraintError for an even kernel size; both one for each axis."""
    if any(is_causal):
        raise UnsupportedError(
            f"rpb: a relative positional bias is not implemented where an axis is causal, got is_causal={is_causal}"
        )
    for axis, kernel in enumerate(kernel_size):
        if kernel % 2 == 0:
            raise ConstraintError(
                f"rpb: a relative positional bias takes odd kernel sizes, got kernel_size={kernel} on axis {axis}"
            )


def check_rpb(rpb: Any, num_heads: int, kernel_size: Sequence[int], is_causal: Sequence[bool]) -> None:
    """`rpb` is `[num_heads, 2 * kernel_size - 1, ...]`, one dimension for each axis; any floating dtype.

    Raises what `check_rpb_is_possible` does, and InputTypeError for what is no floating tensor, InputError for a nested
    one, ConstraintError for a shape; the dimension is named.
    """
    if not isinstance(rpb, Tensor):
        raise InputTypeError(f"rpb: takes a tensor, got {type(rpb).__name__}")
    if rpb.is_nested:
        raise InputError("rpb: takes a plain tensor, got a nested one")
    if not rpb.is_floating_point():
        raise InputTypeError(f"rpb: must be floating, got {rpb.dtype}")
    check_rpb_is_possible(kernel_size, is_causal)
    want = (num_heads, *(2 * kernel - 1 for kernel in kernel_size))
    if rpb.ndim != len(want):
        raise ConstraintError(f"rpb: must be {list(want)}, got {rpb.ndim} dimensions (shape {shape_of(rpb)})")
    for dim, (got, size) in enumerate(zip(rpb.shape, want)):
        if got != size:
            of = "num_heads" if dim == 0 else f"2 * kernel_size - 1 of axis {dim - 1}"
            raise ConstraintError(f"rpb: dimension {dim} ({of}) must be {size}, got {got} (shape {shape_of(rpb)})")


def check_rpb_has_no_tangents(rpb: Tensor | None, *operands: Tensor) -> None:
    """Raises InputError where `rpb` is given, and it or an operand has a tangent of forward-mode differentiation."""
    if rpb is not None and has_tangents(rpb, *operands):
        raise InputError(
            "rpb: a relative positional bias is not supported in forward-mode differentiation; takes None there"
        )
