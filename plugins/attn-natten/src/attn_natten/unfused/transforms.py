"""Gradients and samples of operators, also where torch.func transforms a function.

What torch.library generates for an operator's gradient, torch.func cannot transform; an autograd function it can. So
`call` goes by one where a transform is active, with the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attn_core.tracing import is_traced
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .shapes import apart

#: `(ctx, inputs, output)`, keeps what the backward needs.
Keep = Callable[[Any, tuple[Any, ...], Any], None]
#: `(ctx, *gradients of outputs)` to the gradients of all inputs.
Backward = Callable[..., tuple[Any, ...]]

_FORMULAS: dict[CustomOpDef, tuple[Keep, Backward]] = {}


def differentiate(op: CustomOpDef, keep: Keep, backward: Backward) -> None:
    """Gives `op` its gradients, and takes samples of torch.vmap as more of its first dimension."""
    op.register_autograd(backward, setup_context=keep)
    op.register_vmap(lambda info, in_dims, *inputs: _over_samples(op, info, in_dims, inputs))
    _FORMULAS[op] = keep, backward


def call(op: CustomOpDef, *inputs: Any) -> Any:
    """`op(*inputs)`, differentiable in all ways."""
    if not is_traced() and torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, op)  # type: ignore[no-untyped-call]
    return op(*inputs)


def call_one(op: CustomOpDef, *inputs: Any) -> Tensor:
    """The same of an operator with one output."""
    found: Tensor = call(op, *inputs)
    return found


class _Transformed(torch.autograd.Function):
    """`(*inputs, op)`."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return inputs[-1](*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[-1]
        _FORMULAS[ctx.op][0](ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_FORMULAS[ctx.op][1](ctx, *grads), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _over_samples(inputs[-1], info, in_dims, inputs[:-1])


def _over_samples(op: CustomOpDef, info: Any, in_dims: Any, inputs: tuple[Any, ...]) -> Any:
    tensors = [x for x in inputs if isinstance(x, Tensor)]  # they come first
    folded = [_fold(x, dim, info.batch_size) for x, dim in zip(tensors, in_dims)]
    found = call(op, *folded, *inputs[len(tensors) :])
    if isinstance(found, tuple):
        return tuple(apart(x, 0, (info.batch_size, -1)) for x in found), (0,) * len(found)
    return apart(found, 0, (info.batch_size, -1)), 0


def _fold(tensor: Tensor, dim: int | None, samples: int) -> Tensor:
    each = tensor.expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return each.flatten(0, 1)
