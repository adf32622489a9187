"""Unfused neighborhood attention: the weights as a tensor between two operations, as NATTEN had it up to 0.17.

    attn = na2d_qk(query * scale, key, kernel_size=7, dilation=2)
    out = na2d_av(attn.softmax(-1), value, kernel_size=7, dilation=2)

Operands are heads-first: query, key and value `[batch, num_heads, *spatial, head_dim]`, where `spatial` has one, two or
three axes, and attn `[batch, num_heads, *spatial, width]`. A window has `width = prod(kernel_size)` slots, the first
axis slowest, keys ascending on each; after them come the additional tokens. On a causal axis the keys up to the query
are in the first slots. The others are -inf in the weights, and `av` does not read them.

They are batches of small matrix products on any device, in float64, float32, float16 or bfloat16, for operands of any
strides. They differentiate in reverse mode to any order, and in forward mode; results and gradients are the same from
run to run. Under autocast, operands are cast to its dtype. They compile without a graph break, FlopCounterMode counts
their matrix products, and nested tensors are taken where no gradient is asked for.

For each axis, `kernel_size` is above 1, and `kernel_size * dilation` at most the axis: one int for all axes, or one
for each. A window is moved inward at a border; with a dilation, every `dilation`-th point is a line of its own.

All raise InputError (a ValueError) for parameters of another type or number; ConstraintError (a ValueError and
RuntimeError) for values out of bounds, and for tensors whose rank, shape, dtype or device do not fit; InputTypeError
for what is no tensor.
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import CausalPerAxis, PerAxis
from . import calls

__all__ = ["na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """Weights before the softmax, `[batch, num_heads, length, kernel_size + tokens]`: not scaled; scale query before.

    Args:
        query, key: `[batch, num_heads, length, head_dim]`.
        kernel_size: keys in a window.
        dilation: distance between them.
        additional_keys: `[batch, num_heads, tokens, head_dim]`: every query sees them, too, whatever is causal.
        is_causal: only keys up to the query.
        rpb: a bias for each head and relative position, `[num_heads, 2 * kernel_size - 1]`, added to the products with
            the keys in the window. It is cast to key's dtype, and takes a gradient. Not where an axis is causal
            (UnsupportedError), nor with an even kernel_size, nor in forward-mode differentiation (InputError).
        is_casual: `is_causal` as NATTEN's front page spells it; deprecated.
    """
    return calls.qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, is_casual)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """Each query's sum of the values it sees, by weight: `[batch, num_heads, length, head_dim]`.

    Args:
        attn: `[batch, num_heads, length, kernel_size + tokens]`, after the softmax; cast to value's dtype.
        value: `[batch, num_heads, length, head_dim]`.
        kernel_size, dilation, is_causal, is_casual: as for `na1d_qk`.
        additional_values: `[batch, num_heads, tokens, head_dim]`, for the last weights of `attn`.
    """
    return calls.av(1, attn, value, kernel_size, dilation, additional_values, is_causal, is_casual)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """As `na1d_qk`, on a plane: query and key `[batch, num_heads, height, width, head_dim]`, rpb
    `[num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]`."""
    return calls.qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, is_casual)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """As `na1d_av`, on a plane: attn and value `[batch, num_heads, height, width, ...]`."""
    return calls.av(2, attn, value, kernel_size, dilation, additional_values, is_causal, is_casual)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """As `na1d_qk`, in space: query and key `[batch, num_heads, depth, height, width, head_dim]`, rpb with a dimension
    for each axis."""
    return calls.qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, is_casual)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalPerAxis | None = False,
    *,
    is_casual: CausalPerAxis | None = None,
) -> Tensor:
    """As `na1d_av`, in space: attn and value `[batch, num_heads, depth, height, width, ...]`."""
    return calls.av(3, attn, value, kernel_size, dilation, additional_values, is_causal, is_casual)
