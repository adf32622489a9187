"""Parameters as a tuple with one value for each axis, by the names of `natten.utils`.

Each takes an int (is_causal: a bool), or a tuple or list with one for each of `na_dim` axes, and raises InputError for
anything else. Whether the values fit each other or a tensor is not their concern.
"""

from __future__ import annotations

from math import prod

from attn_core.errors import InputError

from ..arguments import CausalPerAxis, PerAxis, of_each_axis


def check_kernel_size_arg(na_dim: int, kernel_size: PerAxis) -> tuple[int, ...]:
    """`kernel_size`, one for each axis."""
    return of_each_axis("kernel_size", kernel_size, na_dim)


def check_stride_arg(na_dim: int, stride: PerAxis | None) -> tuple[int, ...]:
    """`stride`, one for each axis; None is 1."""
    return of_each_axis("stride", 1 if stride is None else stride, na_dim)


def check_dilation_arg(na_dim: int, dilation: PerAxis | None) -> tuple[int, ...]:
    """`dilation`, one for each axis; None is 1."""
    return of_each_axis("dilation", 1 if dilation is None else dilation, na_dim)


def check_causal_arg(na_dim: int, is_causal: CausalPerAxis | None) -> tuple[bool, ...]:
    """`is_causal`, one for each axis; None is False."""
    return of_each_axis("is_causal", False if is_causal is None else is_causal, na_dim, bool)


def check_all_args(
    na_dim: int, kernel_size: PerAxis, dilation: PerAxis | None, is_causal: CausalPerAxis | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """(kernel_size, dilation, is_causal), each as by its own check: NATTEN 0.17's, without a stride."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """The keys in a window. Raises InputError for what is not a tuple."""
    if not isinstance(kernel_size, tuple):
        raise InputError(f"kernel_size: takes a tuple, got {type(kernel_size).__name__}")
    return prod(kernel_size)
