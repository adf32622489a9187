"""Tells whether operands look as those that a choice was made for.

Everything that a capability or a kernel's memory safety depends on is compared: class, dtype, device, requires_grad,
sizes and strides of every operand, and torch's dispatch state (autocast, functorch, dispatch modes). Done in Python,
that costs more than the rest of a call together; torch has an object for it, which compiled graphs keep for their
inputs. It is not public, so a comparison in Python stands in where another torch has another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Recognise = Callable[..., bool]


def recogniser(tensors: Sequence[Tensor]) -> Recognise:
    """A function of as many tensors: whether they look as `tensors` do, and are the same objects where those are."""
    distinct: list[Tensor] = []
    for tensor in tensors:
        if not any(tensor is other for other in distinct):
            distinct.append(tensor)
    check = _guard(distinct) or _comparison(distinct)
    if len(distinct) == len(tensors):
        return check
    # A guard object refuses a tensor that is given twice, so it is asked about each but once.
    firsts = [next(i for i, tensor in enumerate(tensors) if tensor is one) for one in distinct]
    again = [
        (i, first) for i, tensor in enumerate(tensors) for first in firsts if first < i and tensor is tensors[first]
    ]

    def shared(*given: Tensor) -> bool:
        for place, first in again:
            if given[place] is not given[first]:
                return False
        return check(*[given[first] for first in firsts])

    return shared


def _guard(tensors: list[Tensor]) -> Recognise | None:
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards.check if guards.check(*tensors) else None
    except (AttributeError, TypeError, SystemError, RuntimeError):
        return None


def _comparison(tensors: list[Tensor]) -> Recognise:
    before = _looks(tensors)
    return lambda *given: _looks(given) == before


def _looks(tensors: Sequence[Tensor]) -> list[object]:
    # Every state in which torch would send the same call elsewhere adds keys to one of these sets, or takes some away.
    state = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return [*(keys.raw_repr() for keys in state), *map(_look, tensors)]


def _look(tensor: Tensor) -> tuple[object, ...]:
    keys = torch._C._dispatch_keys(tensor).raw_repr()  # conjugate and negative bits, functorch's wrappers
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.shape, tensor.stride(), keys
