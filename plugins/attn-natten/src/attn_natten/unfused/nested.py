"""Unfused operations on nested tensors: each element, of a shape of its own, by itself; forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attn_core.errors import InputError
from torch import Tensor


def is_nested(*tensors: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors)


def each(function: Callable[..., Tensor], **operands: Tensor | None) -> Tensor:
    """A nested tensor of `function(**elements)` of each element of the operands; None stays None.

    Raises InputError where some are nested and others are not, sizes differ, or one requires a gradient.
    """
    nested = {name: operand for name, operand in operands.items() if operand is not None}
    sizes = {}
    for name, operand in nested.items():
        if not is_nested(operand):
            others = ", ".join(other for other, tensor in nested.items() if is_nested(tensor))
            got = "a plain one" if isinstance(operand, Tensor) else type(operand).__name__
            raise InputError(f"{name}: takes a nested tensor, as {others} is; got {got}")
        if operand.requires_grad:
            raise InputError(f"{name}: autograd is not supported for nested tensors, got one that requires a gradient")
        sizes[name] = operand.size(0)
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} of {size}" for name, size in sizes.items())
        raise InputError(f"{', '.join(sizes)}: take nested tensors of equally many elements, got {got}")
    layout = next(iter(nested.values())).layout
    results = [function(**elements) for elements in _elements(operands, next(iter(sizes.values())))]
    return torch.nested.as_nested_tensor(results, layout=layout)


def _elements(operands: dict[str, Tensor | None], count: int) -> Iterator[dict[str, Tensor | None]]:
    apart = {name: (None,) * count if tensor is None else tensor.unbind() for name, tensor in operands.items()}
    for index in range(count):
        yield {name: tensors[index] for name, tensors in apart.items()}
