"""The two calls for any number of axes: what is passed in is checked, then computed."""

from __future__ import annotations

from typing import Any

import torch
from attn_core.errors import InputError
from torch import Tensor

from ..arguments import (
    CausalPerAxis,
    PerAxis,
    causal_alias,
    check_additional_heads_first,
    check_heads_first,
    check_rpb,
    check_rpb_has_no_tangents,
    check_weights,
    neighborhood,
    window,
)
from ..flops import unfused_in_a_trace
from ..flops.torch_counter import is_counting, is_in_a_trace_of_jit
from . import linear, nested, ops
from .products import Window
from .shapes import apart
from .transforms import call_one

_is_tracing = torch.compiler.is_dynamo_compiling

#: Where warnings point: at the caller of na1d_qk and its like, which call the functions here.
CALLER = 4


def qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_keys: Tensor | None,
    is_causal: CausalPerAxis | None,
    rpb: Tensor | None,
    is_casual: CausalPerAxis | None,
) -> Tensor:
    is_causal = causal_alias(is_causal, is_casual, stacklevel=CALLER)
    if _tell_counters():
        return unfused_in_a_trace.qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)
    if nested.is_nested(query, key, additional_keys):
        _refuse_gradient(rpb)

        def of_element(query: Tensor, key: Tensor, additional_keys: Tensor | None) -> Tensor:
            return _qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)

        return nested.each(of_element, query=query, key=key, additional_keys=additional_keys)
    return _qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_keys: Tensor | None,
    is_causal: CausalPerAxis | None,
    rpb: Tensor | None,
) -> Tensor:
    query, key, additional_keys = (_under_autocast(tensor) for tensor in (query, key, additional_keys))
    spatial = check_heads_first(query, key, rank)
    mask = neighborhood(spatial, kernel_size, dilation=dilation, is_causal=is_causal)
    of_axes = Window(mask.kernel_size, mask.dilation, mask.is_causal)
    if additional_keys is not None:
        check_additional_heads_first("additional_keys", additional_keys, "query", query)
    if rpb is not None:
        check_rpb(rpb, query.shape[1], of_axes.kernel, of_axes.causal)
        check_rpb_has_no_tangents(rpb, query, key, *(() if additional_keys is None else (additional_keys,)))
    attn = linear.weights(query, key, of_axes)
    if rpb is not None:
        attn = attn + call_one(ops.rpb, rpb.to(key.dtype), spatial, of_axes.kernel, of_axes.dilation)
    if additional_keys is None:
        return attn
    tokens = query.flatten(2, -2) @ additional_keys.mT
    return torch.cat([attn, apart(tokens, 2, spatial)], -1)


def av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_values: Tensor | None,
    is_causal: CausalPerAxis | None,
    is_casual: CausalPerAxis | None,
) -> Tensor:
    is_causal = causal_alias(is_causal, is_casual, stacklevel=CALLER)
    if _tell_counters():
        return unfused_in_a_trace.av(rank, attn, value, kernel_size, dilation, additional_values, is_causal)
    if nested.is_nested(attn, value, additional_values):

        def of_element(attn: Tensor, value: Tensor, additional_values: Tensor | None) -> Tensor:
            return _av(rank, attn, value, kernel_size, dilation, additional_values, is_causal)

        return nested.each(of_element, attn=attn, value=value, additional_values=additional_values)
    return _av(rank, attn, value, kernel_size, dilation, additional_values, is_causal)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_values: Tensor | None,
    is_causal: CausalPerAxis | None,
) -> Tensor:
    value, additional_values = _under_autocast(value), _under_autocast(additional_values)
    if isinstance(attn, Tensor) and isinstance(value, Tensor) and attn.is_floating_point():
        attn = attn.to(value.dtype)
    kernels = window(rank, kernel_size, dilation=dilation, is_causal=is_causal)[0]
    spatial = check_weights(attn, value, rank, kernels, additional_values)
    mask = neighborhood(spatial, kernel_size, dilation=dilation, is_causal=is_causal)
    of_axes = Window(mask.kernel_size, mask.dilation, mask.is_causal)
    if additional_values is None:
        return linear.average(attn, value, of_axes)
    width = of_axes.width
    out = linear.average(attn[..., :width], value, of_axes)
    tokens = attn[..., width:].flatten(2, -2) @ additional_values
    return out + apart(tokens, 2, spatial)


def _tell_counters() -> bool:
    """Has whoever counts the ops of this thread know those of this package; whether it is in a trace of torch.jit."""
    return not _is_tracing() and is_counting() and is_in_a_trace_of_jit()


def _under_autocast(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    return linear.as_under_autocast(tensor)


def _refuse_gradient(rpb: Any) -> None:
    if isinstance(rpb, Tensor) and rpb.requires_grad:
        raise InputError("rpb: autograd is not supported for nested tensors, got one that requires a gradient")
