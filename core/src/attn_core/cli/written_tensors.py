"""Tensors written as text, in an expression for a bias: `tensor([[0.5, -inf]])`, `random(4, 5, 5)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

MAX_NUMBERS = 2**24  #: in a tensor


def shown(value: Any) -> str:
    """A value, for people."""
    if value is None or isinstance(value, (bool, int, float, str, tuple, list)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    return f"a {type(value).__name__}"


def _tensor(generator: torch.Generator, values: Any, *, requires_grad: Any = False) -> Tensor:
    """Booleans, whole numbers or floats (float32), in nested lists."""
    if not isinstance(values, (list, tuple)):
        raise InputError(f"tensor: takes values in lists, got {shown(values)}")
    return torch.tensor(values, device="cpu", dtype=_dtype(values), requires_grad=_flag(requires_grad))


def _random(generator: torch.Generator, *shape: Any, requires_grad: Any = False) -> Tensor:
    """Numbers from the standard normal distribution, float32."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
        raise InputError(f"random: takes the sizes of a tensor, whole numbers, got {shown(shape)}")
    if math.prod(sizes) > MAX_NUMBERS:
        raise InputError(f"random: makes at most {MAX_NUMBERS} numbers, got {math.prod(sizes)}")
    made = torch.randn(tuple(sizes), generator=generator, device="cpu", dtype=torch.float32)
    return made.requires_grad_(_flag(requires_grad))


def _dtype(values: Any) -> torch.dtype | None:
    """float32 where there is a float, whatever the default is; else what torch takes the values for."""
    if isinstance(values, (list, tuple)):
        found = [_dtype(value) for value in values]
        return torch.float32 if torch.float32 in found else None
    return torch.float32 if isinstance(values, float) else None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"requires_grad is True or False, got {shown(value)}")
    return value


#: What can be called, by name; the first argument is where random numbers come from.
TENSORS: dict[str, Callable[..., Tensor]] = {"tensor": _tensor, "random": _random}
