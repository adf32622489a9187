"""Operands of unfused calls: heads first.

query, key         `[batch, num_heads, *spatial, head_dim]`
attn               `[batch, num_heads, *spatial, width]`
value              `[batch, num_heads, *spatial, head_dim]`
additional tokens  `[batch, num_heads, tokens, head_dim]`
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ..errors import ConstraintError
from .operands import check_agrees, check_dtype, check_rank, check_size, check_tensor, shape_of
from .parameters import SPATIAL


def check_heads_first(query: Tensor, key: Tensor, rank: int) -> tuple[int, ...]:
    """The spatial shape of `query` and `key`, both `[batch, num_heads, *spatial, head_dim]`.

    Raises InputTypeError for what is no tensor, UnsupportedError for one that is nested or not strided, ConstraintError
    for rank, dtype, device or shape; the dimension is named.
    """
    names = ("batch", "num_heads", *SPATIAL[rank], "head_dim")
    for name, tensor in (("query", query), ("key", key)):
        check_tensor(name, tensor)
        check_rank(name, tensor, names)
        check_dtype(name, tensor)
    check_agrees("key", key, "query", query)
    for dim, called in enumerate(names):
        check_size("key", key, dim, called, "query", query.shape[dim])
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
    check_tensor("attn", attn)
    check_rank("attn", attn, (*names[:-1], "width"))
    check_dtype("attn", attn)
    check_tensor("value", value)
    check_rank("value", value, names)
    check_agrees("value", value, "attn", attn)
    for dim, called in enumerate(names[:-1]):
        check_size("value", value, dim, called, "attn", attn.shape[dim])
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
            f" (shape {shape_of(attn)})"
        )
    return tuple(value.shape[2:-1])


def check_additional_heads_first(name: str, additional: Tensor, like_name: str, like: Tensor) -> None:
    """Additional keys or values of an unfused call: `[batch, num_heads, any number, head_dim]`.

    `like` is query (for keys) or value, `[batch, num_heads, *spatial, head_dim]`. Raises as `check_heads_first` does.
    """
    names = ("batch", "num_heads", "tokens", "head_dim")
    check_tensor(name, additional)
    check_rank(name, additional, names)
    check_agrees(name, additional, like_name, like)
    for dim in (0, 1, -1):
        check_size(name, additional, dim, names[dim], like_name, like.shape[dim])
