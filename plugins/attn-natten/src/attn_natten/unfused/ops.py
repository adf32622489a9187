"""The products as operators of torch.library, namespace `attn_natten`: torch.compile takes them without a graph break,
and FlopCounterMode counts them.

The derivatives of each are again these operators, so gradients of any order exist. Only matrix products count as FLOPs,
2 * batch * num_heads * tokens * width * head_dim for each: what lies in a block beside the window does not count, and
masked slots do.

Parameters are checked before: see `arguments`. Each is a list with one value for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import products, rel_pos
from .products import Window
from .transforms import call, differentiate

MASKED = float("-inf")


@custom_op("attn_natten::qk", mutates_args=())
def qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    masked: float,
) -> Tensor:
    """`[batch, num_heads, *spatial, width]`: each query's products with the keys in its window, and `masked` in the
    slots without a key."""
    with _without_autocast(query):
        return products.weights(query, key, Window.of(kernel_size, dilation, is_causal), masked)


@custom_op("attn_natten::av", mutates_args=())
def av(
    attn: Tensor, value: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> Tensor:
    """`[batch, num_heads, *spatial, head_dim]`: for each query the sum of the values in its window, by weight."""
    with _without_autocast(value):
        return products.average(attn, value, Window.of(kernel_size, dilation, is_causal))


@custom_op("attn_natten::av_transposed", mutates_args=())
def av_transposed(
    attn: Tensor, rows: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> Tensor:
    """`[batch, num_heads, *spatial, head_dim]`: for each key the sum of the rows of the queries that see it, by
    weight."""
    with _without_autocast(rows):
        return products.spread(attn, rows, Window.of(kernel_size, dilation, is_causal))


@custom_op("attn_natten::qk_backward", mutates_args=())
def qk_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """`av(grad, key)` and `av_transposed(grad, query)`, the gradients of `qk`, in one go."""
    with _without_autocast(query):
        return products.average_and_spread(grad, key, query, Window.of(kernel_size, dilation, is_causal))


@custom_op("attn_natten::rpb", mutates_args=())
def rpb(table: Tensor, spatial: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """`[num_heads, *spatial, width]`: what each slot reads of the table of relative positions."""
    return rel_pos.slots(table, spatial, Window.of(kernel_size, dilation, ()))


@custom_op("attn_natten::rpb_transposed", mutates_args=())
def rpb_transposed(attn: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """`[num_heads, 2 * kernel_size - 1, ...]`: for each entry the sum of the slots that read it."""
    return rel_pos.sums(attn, Window.of(kernel_size, dilation, ()))


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Operands have been cast; a backward may run under an autocast that its forward did not."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# What they return, where there is no data


@qk.register_fake
def _(query: Tensor, key: Tensor, kernel_size: Any, dilation: Any, is_causal: Any, masked: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], prod(kernel_size)))


@av.register_fake
@av_transposed.register_fake
def _(attn: Tensor, grid: Tensor, kernel_size: Any, dilation: Any, is_causal: Any) -> Tensor:
    return grid.new_empty(grid.shape)


@qk_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[Tensor, Tensor]:
    return key.new_empty(key.shape), query.new_empty(query.shape)


@rpb.register_fake
def _(table: Tensor, spatial: Any, kernel_size: Any, dilation: Any) -> Tensor:
    return table.new_empty((table.shape[0], *spatial, prod(kernel_size)))


@rpb_transposed.register_fake
def _(attn: Tensor, kernel_size: Any, dilation: Any) -> Tensor:
    return attn.new_empty((attn.shape[0], *(2 * kernel - 1 for kernel in kernel_size)))


# Gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.parameters = inputs[len(tensors) :]


def _qk_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key = ctx.saved_tensors
    *window, _ = ctx.parameters
    to_query = to_key = None
    if all(ctx.needs_input_grad[:2]):
        to_query, to_key = call(qk_backward, grad, query, key, *window)
    elif ctx.needs_input_grad[0]:
        to_query = call(av, grad, key, *window)
    elif ctx.needs_input_grad[1]:
        to_key = call(av_transposed, grad, query, *window)
    return to_query, to_key, None, None, None, None


def _av_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    attn, value = ctx.saved_tensors
    to_attn = call(qk, grad, value, *ctx.parameters, 0.0) if ctx.needs_input_grad[0] else None
    to_value = call(av_transposed, attn, grad, *ctx.parameters) if ctx.needs_input_grad[1] else None
    return to_attn, to_value, None, None, None


def _av_transposed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    attn, rows = ctx.saved_tensors
    to_attn = call(qk, rows, grad, *ctx.parameters, 0.0) if ctx.needs_input_grad[0] else None
    to_rows = call(av, attn, grad, *ctx.parameters) if ctx.needs_input_grad[1] else None
    return to_attn, to_rows, None, None, None


def _qk_backward_backward(ctx: Any, by_query: Tensor, by_key: Tensor) -> tuple[Any, ...]:
    grad, query, key = ctx.saved_tensors
    window = ctx.parameters
    to_grad = to_query = to_key = None
    if ctx.needs_input_grad[0]:
        to_grad = call(qk, by_query, key, *window, 0.0) + call(qk, query, by_key, *window, 0.0)
    if ctx.needs_input_grad[1]:
        to_query = call(av, grad, by_key, *window)
    if ctx.needs_input_grad[2]:
        to_key = call(av_transposed, grad, by_query, *window)
    return to_grad, to_query, to_key, None, None, None


def _rpb_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, kernel_size, dilation = ctx.parameters
    return call(rpb_transposed, grad, kernel_size, dilation), None, None, None


def _keep_spatial(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    attn, *ctx.window = inputs
    ctx.spatial = attn.shape[1:-1]


def _rpb_transposed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return call(rpb, grad, ctx.spatial, *ctx.window), None, None


def _keep_parameters(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.parameters = inputs[1:]


differentiate(qk, _keep, _qk_backward)
differentiate(av, _keep, _av_backward)
differentiate(av_transposed, _keep, _av_transposed_backward)
differentiate(qk_backward, _keep, _qk_backward_backward)
differentiate(rpb, _keep_parameters, _rpb_backward)
differentiate(rpb_transposed, _keep_spatial, _rpb_transposed_backward)


# FLOPs


@register_flop_formula(torch.ops.attn_natten.qk)
def _(query: Any, key: Any, kernel_size: Sequence[int], *rest: Any, **options: Any) -> int:
    return flops(query, kernel_size)


@register_flop_formula([torch.ops.attn_natten.av, torch.ops.attn_natten.av_transposed])
def _(attn: Any, grid: Any, kernel_size: Sequence[int], *rest: Any, **options: Any) -> int:
    return flops(grid, kernel_size)


@register_flop_formula(torch.ops.attn_natten.qk_backward)
def _(grad: Any, query: Any, key: Any, kernel_size: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * flops(query, kernel_size)


#: Those that have one.
COUNTED = tuple(getattr(torch.ops.attn_natten, name) for name in ("qk", "av", "av_transposed", "qk_backward"))


def flops(shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """Of one product, for a grid of this shape, `[batch, num_heads, *spatial, head_dim]`."""
    return 2 * prod(shape) * prod(kernel_size)
