"""A fused call: checks its arguments, flattens the axes, and asks the core; additional keys are a second attention.

    logits = scale * query · key + rpb             in the neighborhood
    logits = scale * query · additional key        for every query

One softmax over both: their two attentions are joined by the core's `merge`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attn_core
import torch
from attn_core import AttnBias, RelPosTable, merge
from attn_core.errors import InputError, InputTypeError
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import check_additional, check_heads_last, check_rpb, has_tangents
from ..autotuner import tuned_for
from ..autotuner.settings import State
from ..backends import FNA, kernel_of
from ..errors import UnsupportedError
from ..flops.torch_counter import is_counting
from ..plain import attention as plain_attention
from ..switches import flex
from .remembered import Known, known, look_at

_is_tracing = torch.compiler.is_dynamo_compiling

#: What the attention to additional keys is not asked by `attention_kwargs`: a fused call settles it.
SETTLED = ("query", "key", "value", "is_causal", "scale", "return_lse")


def or_counted(rank: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    """`neighborhood_attention`; as one op that has a count, where somebody counts the ops of this thread."""
    if not _is_tracing() and is_counting():
        from ..flops.counted import counted  # which is of no use to anybody else

        return counted(rank, query, key, value, *rest)
    return neighborhood_attention(rank, query, key, value, *rest)


def neighborhood_attention(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    rpb: Tensor | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    backend: str | None,
    return_lse: bool,
    attention_kwargs: Mapping[str, Any] | None,
) -> Any:
    """`na1d`, `na2d` and `na3d`, which say what these are."""
    find = look_at if _is_tracing() else known  # a graph cannot look up shapes
    found = find(rank, query, key, value, kernel_size, stride, dilation, is_causal)
    bias = found.bias if rpb is None else with_rpb(found, query, rpb)
    more: tuple[Any, Any] = additional_keys, additional_values
    is_given = additional_keys is not None or additional_values is not None
    has_more = is_given and check_additional(*more, key, value)
    if forward_ad._current_level >= 0:
        refuse_tangents(query, key, value, rpb, *more)
    kernel = None if backend is None else kernel_of(backend, FNA)
    q, k, v = query, key, value
    try:
        if rank > 1:
            q, k, v = q.flatten(1, rank), k.flatten(1, rank), v.flatten(1, rank)
        if has_more and bias is None and kernel is None and not attention_kwargs:  # every query sees every key
            k, v, has_more = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1), False
        wants_lse = return_lse or has_more
        if State.settings.on or flex.is_flex_attention_enabled():
            with switched(found, query, key, value, bias, kernel):
                result = _attention(q, k, v, bias, scale=scale, return_lse=wants_lse, kernel=kernel)
        else:
            result = _attention(q, k, v, bias, scale=scale, return_lse=wants_lse, kernel=kernel)
    except (InputError, InputTypeError, RuntimeError):
        check_heads_last(query, key, value, rank)  # dtypes, devices and layouts, which `known` does not look at
        raise
    if not wants_lse:
        return result if rank == 1 else result.view(found.out)
    out, lse = result
    if has_more:
        outs, lses = zip((out, lse), to_additional(q, *more, scale, attention_kwargs))
        out, lse = merge(outs, lses)
    out = out.view(found.out)
    return (out, lse.transpose(1, 2).reshape(found.out[:-1])) if return_lse else out


_attention: Any = attn_core.attention  # whose overloads ask for a literal return_lse


@contextmanager
def switched(
    found: Known, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, kernel: str | None
) -> Iterator[None]:
    """What the core is asked within, where FlexAttention is asked for, or the autotuner is on.

    Tables of relative positions are not tuned: kernels cut such a problem otherwise.
    """
    with flex.scope():
        if not State.settings.on or (bias is not None and bias.scores):
            yield
            return
        needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        sizes = {"num_kv_heads": key.shape[-2], "head_dim_v": value.shape[-1]}
        with tuned_for(query, found.neighborhood, needs_backward, kernel=kernel, **sizes):
            yield


def with_rpb(found: Known, query: Tensor, rpb: Tensor) -> AttnBias:
    """The neighborhood, and what `rpb` adds within it. Raises what `check_rpb` does."""
    meant = found.neighborhood
    check_rpb(rpb, query.shape[-2], meant.kernel_size, meant.is_causal)
    table = RelPosTable(rpb.to(query.dtype), meant.extents, meant.dilation)
    return table if found.bias is None else table + found.bias


def to_additional(
    query: Tensor, keys: Tensor, values: Tensor, scale: float | None, options: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of every query's attention to the additional keys; operands `[batch, length, num_heads, head_dim]`."""
    if not options:
        return attn_core.attention(query, keys, values, scale=scale, return_lse=True)
    for name in SETTLED:
        if name in options:
            raise InputError(f"attention_kwargs: takes options of attention() other than {name!r}, got {options!r}")
    out, lse = plain_attention(query, keys, values, scale=scale, return_lse=True, **options)
    return out, lse.transpose(1, 2)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises UnsupportedError where one of them carries a tangent of forward-mode differentiation."""
    if has_tangents(*[tensor for tensor in tensors if tensor is not None]):
        raise UnsupportedError(
            "query, key, value: a fused call takes no tangents of forward-mode differentiation; na1d_qk, na1d_av and"
            " their kind, the unfused operations, do"
        )
