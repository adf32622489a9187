"""Operands of fused calls: heads last.

query  `[batch, *spatial, num_heads, head_dim]`
key    `[batch, *spatial, num_kv_heads, head_dim]`      additional keys    `[batch, length, num_kv_heads, head_dim]`
value  `[batch, *spatial, num_kv_heads, head_dim_v]`    additional values  `[batch, length, num_kv_heads, head_dim_v]`
"""

from __future__ import annotations

from typing import Any

import torch
from attn_core.errors import InputError
from torch import Tensor

from ..errors import ConstraintError
from ..switches.strict import are_strict_checks_enabled
from .operands import check_agrees, check_dtype, check_rank, check_size, check_tensor, plain
from .parameters import SPATIAL

#: What head_dim had to be a multiple of in NATTEN 0.17's fused kernels.
STRICT_MULTIPLE = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}


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

    After `use_strict_checks()` also ConstraintError for fewer num_kv_heads, float64, and a head_dim or head_dim_v that
    is no multiple of 4 (float32) or 8 (float16, bfloat16).
    """
    names = ("batch", *SPATIAL[rank], "num_heads", "head_dim")
    operands = (("query", query), ("key", key), ("value", value))
    for name, tensor in operands:
        check_tensor(name, tensor)
        check_rank(name, tensor, names)
        check_dtype(name, tensor)
    for name, tensor in operands[1:]:
        check_agrees(name, tensor, "query", query)
        for dim in range(rank + 1):
            check_size(name, tensor, dim, names[dim], "query", query.shape[dim])
    check_size("key", key, -1, "head_dim", "query", query.shape[-1])
    num_heads, num_kv_heads = query.shape[-2], key.shape[-2]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConstraintError(f"key: num_heads must divide query's num_heads={num_heads}, got {num_kv_heads}")
    check_size("value", value, -2, "num_heads", "key", num_kv_heads)
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
        check_tensor(name, tensor)
        check_rank(name, tensor, names)
        check_agrees(name, tensor, like_name, like)
        for dim in (0, -2, -1):
            check_size(name, tensor, dim, names[dim], like_name, like.shape[dim])
    check_size("additional_values", additional_values, 1, "length", "additional_keys", additional_keys.shape[1])
    return True


def _check_strictly(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[-2] != query.shape[-2]:
        raise ConstraintError(
            f"key: num_heads must be query's {query.shape[-2]}, got {key.shape[-2]}; fewer are taken unless"
            " use_strict_checks() is on"
        )
    if query.dtype not in STRICT_MULTIPLE:
        accepted = ", ".join(plain(dtype) for dtype in STRICT_MULTIPLE)
        raise ConstraintError(
            f"query: dtype must be one of {accepted} in a fused call, got {plain(query.dtype)}; it is taken unless"
            " use_strict_checks() is on"
        )
    multiple = STRICT_MULTIPLE[query.dtype]
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] % multiple:
            raise ConstraintError(
                f"{name}: head_dim must be a multiple of {multiple} for {plain(query.dtype)} in a fused call, got"
                f" {tensor.shape[-1]}; it is taken unless use_strict_checks() is on"
            )
