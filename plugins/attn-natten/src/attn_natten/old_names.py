"""The unfused operations by the names of NATTEN 0.14 and before, under which models still import them.

Each is an operation of today, with the bias third where there is one, and a kernel size and dilation for all axes; in
3-D, first those of the depth, then those of height and width. Each warns that it is deprecated.
"""

from __future__ import annotations

import warnings

from attn_core.tracing import constant
from torch import Tensor

from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na1d_qk`."""
    _say_deprecated("natten1dqkrpb", "na1d_qk")
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na2d_qk`."""
    _say_deprecated("natten2dqkrpb", "na2d_qk")
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """Deprecated: `na3d_qk`."""
    _say_deprecated("natten3dqkrpb", "na3d_qk")
    kernels, dilations = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, kernels, dilations, rpb=rpb)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na1d_qk`."""
    _say_deprecated("natten1dqk", "na1d_qk")
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na2d_qk`."""
    _say_deprecated("natten2dqk", "na2d_qk")
    return na2d_qk(query, key, kernel_size, dilation)


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """Deprecated: `na3d_qk`."""
    _say_deprecated("natten3dqk", "na3d_qk")
    kernels, dilations = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, kernels, dilations)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na1d_av`."""
    _say_deprecated("natten1dav", "na1d_av")
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Deprecated: `na2d_av`."""
    _say_deprecated("natten2dav", "na2d_av")
    return na2d_av(attn, value, kernel_size, dilation)


def natten3dav(
    attn: Tensor, value: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """Deprecated: `na3d_av`."""
    _say_deprecated("natten3dav", "na3d_av")
    kernels, dilations = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_av(attn, value, kernels, dilations)


@constant
def _say_deprecated(name: str, instead: str) -> None:
    warnings.warn(f"{name} is deprecated; use {instead}", DeprecationWarning, stacklevel=3)
