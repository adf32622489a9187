"""The door of the front end: what is passed in, checked once, in the caller's words.

Every error names the argument, what is accepted and what was given. Parameters that have a value on each axis come out
as tuples. Where a call is legal, what NATTEN 0.17's kernels could not take and those here can is refused only after
`use_strict_checks()`.

    unfused   query, key  `[batch, num_heads, *spatial, head_dim]`     attn  `[batch, num_heads, *spatial, width]`
    fused     query       `[batch, *spatial, num_heads, head_dim]`     key, value with num_kv_heads, which divides it
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from attn_core import Neighborhood
from attn_core.errors import InputError, InputTypeError
from torch import Tensor
from torch.autograd import forward_ad

from .errors import ConstraintError, UnsupportedError
from .switches.strict import are_strict_checks_enabled

#: A value for all axes, or one for each.
PerAxis = int | Sequence[int]
CausalPerAxis = bool | Sequence[bool]

SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: What head_dim had to be a multiple of in NATTEN 0.17's fused kernels.
STRICT_MULTIPLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}

_INTEGERS = (int, torch.SymInt)  # the latter where a graph is traced


# Parameters


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
            raise ConstraintError(
                f"kernel_size, dilation: each axis must be at least kernel_size * dilation; the"
                f" {_called(axis, extents)} is {extent}, with kernel_size={kernel} * dilation={step} = {kernel * step}"
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
    warnings.warn("is_casual is a misspelling of is_causal, and deprecated", DeprecationWarning, stacklevel=stacklevel)
    return is_casual


# Fused: heads last


def check_heads_last(query: Tensor, key: Tensor, value: Tensor, rank: int) -> tuple[int, ...]:
    """The spatial shape of the operands of a fused call of `rank` axes.

    Args:
        query: `[batch, *spatial, num_heads, head_dim]`.
        key: `[batch, *spatial, num_kv_heads, head_dim]`, where num_kv_heads divides num_heads.
        value: `[batch, *spatial, num_kv_heads, head_dim_v]`.

    Raises:
        InputTypeError: no tensor.
        UnsupportedError: nested or not strided.
        ConstraintError: rank, dtype, device or shapes that do not fit; the dimension is named.

    After `use_strict_checks()` also: ConstraintError for float64, for a head_dim or head_dim_v that is no multiple of 4
    (float32) or 8 (float16, bfloat16); UnsupportedError under forward-mode differentiation.
    """
    names = ("batch", *SPATIAL[rank], "num_heads", "head_dim")
    operands = (("query", query), ("key", key), ("value", value))
    for name, tensor in operands:
        _check_tensor(name, tensor)
        _check_rank(name, tensor, names)
        _check_dtype(name, tensor, query)
    for name, tensor in operands[1:]:
        for dim in range(rank + 1):
            _check_size(name, tensor, dim, names[dim], "query", query.shape[dim])
    _check_size("value", value, -2, "num_heads", "key", key.shape[-2])
    _check_size("key", key, -1, "head_dim", "query", query.shape[-1])
    num_heads, num_kv_heads = query.shape[-2], key.shape[-2]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConstraintError(f"key: num_heads must divide query's num_heads={num_heads}, got {num_kv_heads}")
    if are_strict_checks_enabled():
        _check_strictly(query, key, value)
    return tuple(query.shape[1:-2])


def check_additional(additional_keys: Any, additional_values: Any, key: Tensor, value: Tensor) -> bool:
    """Whether a fused call has additional keys and values: `[batch, any number, num_kv_heads, head_dim or head_dim_v]`.

    Raises InputError where only one is given; InputTypeError, UnsupportedError or ConstraintError for one that does not
    fit `key` and `value`, `[batch, *spatial, num_kv_heads, ...]`.
    """
    if additional_keys is None and additional_values is None:
        return False
    if additional_keys is None or additional_values is None:
        given, missing = ("additional_values", "additional_keys")
        if additional_keys is not None:
            given, missing = missing, given
        raise InputError(f"{missing}: takes a tensor where {given} is given, got None")
    names = ("batch", "length", "num_heads", "head_dim")
    both = (("additional_keys", additional_keys, "key", key), ("additional_values", additional_values, "value", value))
    for name, tensor, like_name, like in both:
        _check_tensor(name, tensor)
        _check_rank(name, tensor, names)
        _check_agrees(name, tensor, like_name, like)
        for dim in (0, -2, -1):
            _check_size(name, tensor, dim, names[dim], like_name, like.shape[dim])
    _check_size("additional_values", additional_values, 1, "length", "additional_keys", additional_keys.shape[1])
    return True


# Unfused: heads first


def check_heads_first(query: Tensor, key: Tensor, rank: int) -> tuple[int, ...]:
    """The spatial shape of `query` and `key`, both `[batch, num_heads, *spatial, head_dim]`.

    Raises InputTypeError for what is no tensor, UnsupportedError for one that is nested or not strided, ConstraintError
    for rank, dtype, device or shape; the dimension is named.
    """
    names = ("batch", "num_heads", *SPATIAL[rank], "head_dim")
    for name, tensor in (("query", query), ("key", key)):
        _check_tensor(name, tensor)
        _check_rank(name, tensor, names)
        _check_dtype(name, tensor, query)
    for dim, called in enumerate(names):
        _check_size("key", key, dim, called, "query", query.shape[dim])
    return tuple(query.shape[2:-1])


def check_weights(
    attn: Tensor, value: Tensor, rank: int, kernel_size: Sequence[int], additional_values: Tensor | None = None
) -> tuple[int, ...]:
    """The spatial shape of `attn` and `value`.

    Args:
        attn: `[batch, num_heads, *spatial, width]`, width the keys in a window, and after them the additional tokens.
        value: `[batch, num_heads, *spatial, head_dim]`.
        kernel_size: one for each axis.
        additional_values: `[batch, num_heads, tokens, head_dim]`; see `check_additional_heads_first`.

    Raises what `check_heads_first` does, and ConstraintError for another width.
    """
    names = ("batch", "num_heads", *SPATIAL[rank], "head_dim")
    _check_tensor("attn", attn)
    _check_rank("attn", attn, (*names[:-1], "width"))
    _check_dtype("attn", attn, attn)
    _check_tensor("value", value)
    _check_rank("value", value, names)
    _check_agrees("value", value, "attn", attn)
    for dim, called in enumerate(names[:-1]):
        _check_size("value", value, dim, called, "attn", attn.shape[dim])
    tokens = 0
    if additional_values is not None:
        check_additional_heads_first("additional_values", additional_values, "value", value)
        tokens = additional_values.shape[2]
    in_window = prod(kernel_size)
    if attn.shape[-1] != in_window + tokens:
        how = f"{in_window} keys in a window of {tuple(kernel_size)}"
        if tokens:
            how += f" and {tokens} additional tokens"
        raise ConstraintError(
            f"attn: the last dimension must be {in_window + tokens} ({how}), got {attn.shape[-1]}"
            f" (shape {_shape(attn)})"
        )
    return tuple(value.shape[2:-1])


def check_additional_heads_first(name: str, additional: Tensor, like_name: str, like: Tensor) -> None:
    """Additional keys or values of an unfused call: `[batch, num_heads, any number, head_dim]`.

    `like` is query (for keys) or value, `[batch, num_heads, *spatial, head_dim]`. Raises as `check_heads_first` does.
    """
    names = ("batch", "num_heads", "tokens", "head_dim")
    _check_tensor(name, additional)
    _check_rank(name, additional, names)
    _check_agrees(name, additional, like_name, like)
    for dim in (0, 1, -1):
        _check_size(name, additional, dim, names[dim], like_name, like.shape[dim])


# The relative positional bias


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
        raise ConstraintError(f"rpb: must be {list(want)}, got {rpb.ndim} dimensions (shape {_shape(rpb)})")
    for dim, (got, size) in enumerate(zip(rpb.shape, want)):
        if got != size:
            of = "num_heads" if dim == 0 else f"2 * kernel_size - 1 of axis {dim - 1}"
            raise ConstraintError(f"rpb: dimension {dim} ({of}) must be {size}, got {got} (shape {_shape(rpb)})")


def check_rpb_has_no_tangents(rpb: Tensor | None, *operands: Tensor) -> None:
    """Raises InputError where `rpb` is given, and it or an operand has a tangent of forward-mode differentiation."""
    if rpb is not None and has_tangents(rpb, *operands):
        raise InputError(
            "rpb: a relative positional bias is not supported in forward-mode differentiation; takes None there"
        )


def has_tangents(*tensors: Tensor) -> bool:
    """Whether one of them is a dual tensor of the forward-mode level that is entered now."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


# What all of them need


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name}: takes a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise UnsupportedError(f"{name}: takes plain tensors here, got a nested one")
    if tensor.layout is not torch.strided:
        raise UnsupportedError(f"{name}: takes plain tensors, got one of layout {tensor.layout}")


def _check_rank(name: str, tensor: Tensor, names: tuple[str, ...]) -> None:
    if tensor.ndim != len(names):
        raise ConstraintError(
            f"{name}: must be [{', '.join(names)}], {len(names)} dimensions; got {tensor.ndim} (shape {_shape(tensor)})"
        )


def _check_dtype(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(_plain(dtype) for dtype in DTYPES)
        raise ConstraintError(f"{name}: dtype must be one of {accepted}, got {_plain(tensor.dtype)}")
    if tensor is not query:
        _check_agrees(name, tensor, "query", query)


def _check_agrees(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise ConstraintError(f"{name}: must have {like_name}'s dtype {_plain(like.dtype)}, got {_plain(tensor.dtype)}")
    if tensor.device != like.device:
        raise ConstraintError(f"{name}: must be on {like_name}'s device {like.device}, got {tensor.device}")


def _check_size(name: str, tensor: Tensor, dim: int, called: str, like_name: str, size: int) -> None:
    if tensor.shape[dim] != size:
        at = dim % tensor.ndim
        raise ConstraintError(
            f"{name}: {called} (dimension {at}) must be {like_name}'s {size}, got {tensor.shape[dim]}"
            f" (shape {_shape(tensor)})"
        )


def _check_strictly(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in STRICT_MULTIPLE:
        accepted = ", ".join(_plain(dtype) for dtype in STRICT_MULTIPLE)
        raise ConstraintError(
            f"query: dtype must be one of {accepted} in a fused call, got {_plain(query.dtype)}; it is taken unless"
            " use_strict_checks() is on"
        )
    multiple = STRICT_MULTIPLE[query.dtype]
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] % multiple:
            raise ConstraintError(
                f"{name}: head_dim must be a multiple of {multiple} for {_plain(query.dtype)} in a fused call, got"
                f" {tensor.shape[-1]}; it is taken unless use_strict_checks() is on"
            )
    if has_tangents(query, key, value):
        raise UnsupportedError(
            "query, key, value: a fused call takes no tangents of forward-mode differentiation; they are taken unless"
            " use_strict_checks() is on"
        )


def _called(axis: int, extents: tuple[int, ...]) -> str:
    return f"{SPATIAL[len(extents)][axis]} (axis {axis})"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
