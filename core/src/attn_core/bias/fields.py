"""What can be told of a bias from its fields: its parameters, and the tensors that it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


if TYPE_CHECKING:
    Derived = property
else:

    class Derived:
        """A property that gives way to an attribute of the same name.

        Whoever writes a bias of three methods knows nothing of the rest, and may well keep a `mask` or a `device`.
        """

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self._compute = compute
            self.__doc__ = compute.__doc__

        def __get__(self, bias: Any, cls: type) -> Any:
            return self if bias is None else self._compute(bias)


def parameters(bias: Any) -> list[tuple[str, Any]]:
    """(name, value) of what the constructor of a dataclass takes, or else of all attributes; `lengths` apart."""
    if not is_dataclass(bias):
        return [(name, value) for name, value in vars(bias).items() if name != "lengths"]
    names = [field.name for field in fields(bias) if field.init and field.name != "lengths"]
    return [(name, getattr(bias, name)) for name in names]


def changed(bias: T, changes: dict[str, Any]) -> T:
    """A copy with other values of some fields; through the constructor, and its checks, of a dataclass."""
    if is_dataclass(bias):
        return replace(bias, **changes)  # type: ignore[type-var]
    made = copy.copy(bias)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


def made(cls: type[T], values: dict[str, Any]) -> T:
    """One of these values."""
    if is_dataclass(cls):
        return cls(**values)
    bias = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(bias, name, value)
    return bias


def look(value: Any) -> Any:
    """What of a parameter a choice may depend on: all of it, or of a tensor everything but the data."""
    if not isinstance(value, Tensor):
        return value
    return type(value), value.shape, value.dtype, value.device, value.stride(), value.requires_grad


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor without data that looks the same; made anew, since within a transform of torch.func what is moved is
    still a part of it."""
    grad = tensor.requires_grad
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta", requires_grad=grad)


class Unwritable:
    """A subclass stands in the facts of a bias for what of it text cannot say; `why` continues "this"."""

    why: str


def as_fact(value: Any) -> tuple[Any, ...]:
    """A parameter as a constant of a graph."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    # Where sizes are dynamic, dynamo takes a float for a symbol, of which this makes a constant.
    return (None, value.__float__() if isinstance(value, (float, torch.SymFloat)) else value)


def from_fact(fact: tuple[Any, ...]) -> Any:
    """The parameter again; of a tensor one without data."""
    shape = fact[0]
    return fact[1] if shape is None else torch.empty(shape, dtype=fact[1], device="meta", requires_grad=fact[2])
