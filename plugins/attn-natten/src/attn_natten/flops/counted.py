"""A fused call as one op of torch.library, for those who count what a call does by its ops.

Kernels do what they do in ops of their own, which no counter knows, or which count the pairs that were visited instead
of those that were asked for. So while somebody counts, a fused call is `attn_natten::fna`, whose count is that of the
formula, whichever kernel runs inside. Its backward, `attn_natten::fna_backward`, runs the forward again.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from attn_core.dispatch import as_under_autocast, autocast_of
from torch import Tensor

from ..arguments import check_additional, check_heads_last, neighborhood, window

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values,"
    " int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float? scale, str? backend,"
    " str attention_kwargs, bool return_lse"
)
_KEYS = torch._C.DispatchKey
_recording: Any = torch._C._SetExcludeDispatchKeyGuard
#: Operands of the schema that may need a gradient, and come first.
OPERANDS = 6

_library = torch.library.Library("attn_natten", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"fna({_SCHEMA}) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    f"fna_backward(Tensor grad_out, Tensor? grad_lse, bool[] wanted, {_SCHEMA}) -> Tensor[]"
)


def counted(
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
    """A fused call, as one op. Takes and raises what `fused.call.neighborhood_attention` does."""
    *sizes, causal = window(rank, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    parameters = [*map(list, sizes), list(map(int, causal))]  # a trace of torch.jit takes no list of bools
    cast_to = autocast_of(query)
    operands = [query, key, value, rpb, additional_keys, additional_values]
    if cast_to is not None:  # inside of an op, autocast is off
        operands = [x if x is None or x is rpb else as_under_autocast(x, cast_to) for x in operands]
    options = repr(None if attention_kwargs is None else dict(attention_kwargs))
    out, lse = torch.ops.attn_natten.fna(*operands, *parameters, scale, backend, options, return_lse)
    return (out, lse) if return_lse else out


def _attention(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The call that the arguments of the op describe."""
    from ..fused.call import neighborhood_attention  # which imports this module

    query, key, value, rpb, keys, values, kernel_size, stride, dilation, causal, *rest = arguments
    scale, backend, options, return_lse = rest
    result = neighborhood_attention(
        query.ndim - 3,
        query,
        key,
        value,
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        tuple(map(bool, causal)),
        rpb,
        scale,
        keys,
        values,
        backend,
        return_lse,
        ast.literal_eval(options),
    )
    return result if return_lse else (result, None)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _attention(*arguments)
    return out, out.new_empty(0) if lse is None else lse


def _backward(grad_out: Tensor, grad_lse: Tensor | None, wanted: Sequence[bool], *arguments: Any) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_(want) for x, want in zip(arguments[:OPERANDS], wanted)]
    inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    # Below a mode of dispatch, what records gradients is left out, whatever the grad mode says.
    with torch.enable_grad(), _recording(_KEYS.AutogradFunctionality, False), _recording(_KEYS.ADInplaceOrView, False):
        out, lse = _attention(*leaves, *arguments[OPERANDS:])
        results, grads = [out], [grad_out]
        if grad_lse is not None and lse is not None:
            results, grads = [out, lse], [grad_out, grad_lse]
        found = torch.autograd.grad(results, inputs, grads, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found)]


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, key, value, _, keys, values, *parameters, _, _, _, return_lse = arguments
    kernel_size, stride, dilation, causal = parameters
    spatial = check_heads_last(query, key, value, query.ndim - 3)
    is_causal = tuple(map(bool, causal))
    neighborhood(spatial, tuple(kernel_size), stride=tuple(stride), dilation=tuple(dilation), is_causal=is_causal)
    check_additional(keys, values, key, value)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1] if return_lse else (0,), dtype=wide)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, wanted: Sequence[bool], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, want in zip(arguments[:OPERANDS], wanted) if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:OPERANDS])
    ctx.options = inputs[OPERANDS:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    query, _, value, *_ = operands
    if grad_out is None:
        grad_out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    wanted = list(ctx.needs_input_grad[:OPERANDS])
    found = list(torch.ops.attn_natten.fna_backward(grad_out, grad_lse, wanted, *operands, *ctx.options))
    return *(found.pop(0) if want else None for want in wanted), *(None for _ in ctx.options)


for _name, _run, _fake in (("fna", _forward, _fake_forward), ("fna_backward", _backward, _fake_backward)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attn_natten::{_name}", _fake, lib=_library)
torch.library.register_autograd("attn_natten::fna", _gradients, setup_context=_setup, lib=_library)


def macs(
    query: Sequence[int], value: Sequence[int], additional_keys: Sequence[int] | None, kernel_size: Sequence[int]
) -> int:
    """Multiply-accumulates of a call of these shapes: both matrix products, of every weight that a query has."""
    width = prod(kernel_size) + (0 if additional_keys is None else additional_keys[1])
    batch, *spatial, num_heads, head_dim = query
    return batch * num_heads * prod(spatial) * width * (head_dim + value[-1])


def macs_of_backward(
    query: Sequence[int], value: Sequence[int], additional_keys: Sequence[int] | None, kernel_size: Sequence[int]
) -> int:
    """The same of a backward: the logits anew, and gradients to query and key, each of head_dim; those to the weights
    and to value, of head_dim_v."""
    head_dim, head_dim_v = query[-1], value[-1]
    each = macs(query, value, additional_keys, kernel_size) // (head_dim + head_dim_v)
    return each * (3 * head_dim + 2 * head_dim_v)
