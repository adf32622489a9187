"""na1d, na2d, na3d: fused neighborhood attention, heads-last, as NATTEN 0.17 and 0.20 and later write it.

What comes behind kernel_size is taken by keyword alone: the fifth argument is the dilation in NATTEN 0.17, and the
stride since 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_core.errors import InputTypeError
from torch import Tensor

from ..arguments import CausalPerAxis, PerAxis, causal_alias
from ..options import NO_OPTIONS_OF_FUSED
from .call import or_counted
from .told import told


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *by_position: Any,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    xformers_kwargs: Mapping[str, Any] | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    q_tile_shape: PerAxis | None = None,
    kv_tile_shape: PerAxis | None = None,
    backward_q_tile_shape: PerAxis | None = None,
    backward_kv_tile_shape: PerAxis | None = None,
    backward_kv_splits: PerAxis | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    is_casual: CausalPerAxis | None = None,
) -> Any:
    """Neighborhood attention on a line, as `na2d` says.

    Args:
        query: `[batch, length, num_heads, head_dim]`.
        key: `[batch, length, num_kv_heads, head_dim]`.
        value: `[batch, length, num_kv_heads, head_dim_v]`.
        rpb: `[num_heads, 2 * kernel_size - 1]`.

    Returns `out`, `[batch, length, num_heads, head_dim_v]`; with `return_lse`, `(out, lse)`, lse
    `[batch, length, num_heads]`. The other arguments, and what is raised, are those of `na2d`. Parameters are a value,
    or a tuple of one.
    """
    if by_position:
        refuse_by_position("na1d", by_position)
    if is_casual is not None:
        is_causal = causal_alias(is_causal, is_casual)
    options = (
        xformers_kwargs,
        q_tile_shape,
        kv_tile_shape,
        backward_q_tile_shape,
        backward_kv_tile_shape,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    arguments = (
        1,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        backend,
        return_lse,
        attention_kwargs,
    )
    if options == NO_OPTIONS_OF_FUSED:
        return or_counted(*arguments)
    with told("na1d", 1, backend, options):
        return or_counted(*arguments)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *by_position: Any,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    xformers_kwargs: Mapping[str, Any] | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    q_tile_shape: PerAxis | None = None,
    kv_tile_shape: PerAxis | None = None,
    backward_q_tile_shape: PerAxis | None = None,
    backward_kv_tile_shape: PerAxis | None = None,
    backward_kv_splits: PerAxis | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    is_casual: CausalPerAxis | None = None,
) -> Any:
    """Neighborhood attention on a plane: each query sees the keys in a window around it.

    Args:
        query: `[batch, height, width, num_heads, head_dim]`; float64, float32, float16 or bfloat16.
        key: `[batch, height, width, num_kv_heads, head_dim]`; num_kv_heads divides num_heads.
        value: `[batch, height, width, num_kv_heads, head_dim_v]`.
        kernel_size: keys in a window, > 1; where it is even, one more before the query than behind it. At a border
            the window is moved inward: it has as many keys everywhere.
        stride: queries that share one window, 1 to kernel_size (generalized neighborhood attention, arXiv:2504.16922).
        dilation: distance between the keys of a window; kernel_size * dilation is at most the axis.
        is_causal: the window ends with the query.
        rpb: relative positional bias, `[num_heads, 2 * kernel_size - 1, ...]`, added to the scaled logits: for query i
            and key j the entry `j - i + kernel_size - 1` (`j - i` in steps of the dilation). For odd kernel sizes
            without a causal axis. A gradient flows to it.
        scale: default `head_dim ** -0.5`; 0.0 is honoured.
        additional_keys: `[batch, any number, num_kv_heads, head_dim]`, which every query sees beside its window, in
            the same softmax; rpb and masks do not touch them.
        additional_values: `[batch, as many, num_kv_heads, head_dim_v]`.
        backend: "cutlass-fna", "hopper-fna", "blackwell-fna" or "flex-fna", the kernels `natten/<backend>`; or the
            name of any kernel of attn; None: the best that takes the problem.
        return_lse: also return the log-sum-exp of the logits, with additional keys over all of them.
        attention_kwargs: options of `attention` for the additional keys, such as its `backend`.
        is_casual: deprecated; a misspelling of is_causal.

    Parameters are one value for both axes, or a tuple with one for each.

    The others are options of NATTEN's kernels. Tiles, the schedule, parts of keys and values, and how these are summed
    are told to the kernel where `backend` names one of NATTEN's, outside of graphs; what the autotuner finds comes
    first. Else, and the rest anywhere, they have no effect, which is said once for each that is given.

    Returns:
        `out`, `[batch, height, width, num_heads, head_dim_v]` in query's dtype; with `return_lse`, `(out, lse)`, lse
        `[batch, height, width, num_heads]` in float32 (float64 for float64), natural log. Both are differentiable.

    Raises:
        InputTypeError: arguments by position behind kernel_size; operands that are no tensors.
        InputError: a parameter of another type or length; additional keys without values, or the other way around.
        ConstraintError (a ValueError and a RuntimeError): shapes, dtypes, devices or numbers that do not fit together.
        UnsupportedError (a NotImplementedError): nested tensors, forward-mode differentiation, rpb with a causal axis.
        UnknownBackendError, KernelRefusedError: `backend` is unknown, not there, or refuses; with its reasons.
    """
    if by_position:
        refuse_by_position("na2d", by_position)
    if is_casual is not None:
        is_causal = causal_alias(is_causal, is_casual)
    options = (
        xformers_kwargs,
        q_tile_shape,
        kv_tile_shape,
        backward_q_tile_shape,
        backward_kv_tile_shape,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    arguments = (
        2,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        backend,
        return_lse,
        attention_kwargs,
    )
    if options == NO_OPTIONS_OF_FUSED:
        return or_counted(*arguments)
    with told("na2d", 2, backend, options):
        return or_counted(*arguments)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *by_position: Any,
    stride: PerAxis | None = 1,
    dilation: PerAxis | None = 1,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    xformers_kwargs: Mapping[str, Any] | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    q_tile_shape: PerAxis | None = None,
    kv_tile_shape: PerAxis | None = None,
    backward_q_tile_shape: PerAxis | None = None,
    backward_kv_tile_shape: PerAxis | None = None,
    backward_kv_splits: PerAxis | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    is_casual: CausalPerAxis | None = None,
) -> Any:
    """Neighborhood attention in space, as `na2d` says.

    Args:
        query: `[batch, depth, height, width, num_heads, head_dim]`.
        key: `[batch, depth, height, width, num_kv_heads, head_dim]`.
        value: `[batch, depth, height, width, num_kv_heads, head_dim_v]`.
        rpb: `[num_heads, 2 * kernel_size - 1, ...]`.

    Returns `out`, `[batch, depth, height, width, num_heads, head_dim_v]`; with `return_lse`, `(out, lse)`, lse
    `[batch, depth, height, width, num_heads]`. The other arguments, and what is raised, are those of `na2d`. Parameters
    are a value, or a tuple of three.
    """
    if by_position:
        refuse_by_position("na3d", by_position)
    if is_casual is not None:
        is_causal = causal_alias(is_causal, is_casual)
    options = (
        xformers_kwargs,
        q_tile_shape,
        kv_tile_shape,
        backward_q_tile_shape,
        backward_kv_tile_shape,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    arguments = (
        3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        backend,
        return_lse,
        attention_kwargs,
    )
    if options == NO_OPTIONS_OF_FUSED:
        return or_counted(*arguments)
    with told("na3d", 3, backend, options):
        return or_counted(*arguments)


def refuse_by_position(function: str, given: tuple[Any, ...]) -> None:
    """Raises InputTypeError for arguments by position that different versions of NATTEN take for different things."""
    raise InputTypeError(
        f"{function}: takes query, key, value and kernel_size by position and the rest by keyword, got {len(given)}"
        f" more by position: {', '.join(map(repr, given))}. The fifth is dilation in NATTEN 0.17, and stride since 0.20"
    )
