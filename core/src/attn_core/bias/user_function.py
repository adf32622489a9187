"""What functions written by users have in common: how they are called and named, and what is seen of their captures.

A function is called once with index tensors that broadcast, not once per pair. It may read anything, so of what it
captures only this is asked: whether a gradient flows to it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..errors import AttnError, InputError, InputTypeError
from .base import _is_tracing

Function = Callable[..., Any]

AXES = ("batch", "num_heads", "seqlen_q", "seqlen_kv")

ADVICE = (
    "it is called once, with index tensors that broadcast against each other: write & | ~ and torch.where for"
    " `and or not if`, torch.minimum for min(), and doc[b, q] for doc[b][q]"
)


class Absent:
    """Stands for a function where a bias without data is kept; knows its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self, *arguments: Tensor) -> Tensor:
        raise InputError(
            f"bias: {self.name} is known by its name alone here; what describes a problem holds no function"
        )


def check_function(kind: str, function: Any, parameters: tuple[str, ...], tensors: Any) -> tuple[Tensor, ...]:
    """The tensors, as a tuple. Raises InputTypeError for what is none, or a function that cannot be called with all."""
    if not isinstance(tensors, (tuple, list)):
        raise InputTypeError(f"{kind}: tensors must be a tuple of tensors, got {type(tensors).__name__}")
    wanted = f"({', '.join(parameters)}{', *tensors' if tensors else ''})"
    if not callable(function):
        raise InputTypeError(f"{kind}: takes a function {wanted}, got {type(function).__name__}")
    for n, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{kind}: tensors must be tensors, got {type(tensor).__name__} at index {n}")
    if _is_tracing() or isinstance(function, Absent):
        return tuple(tensors)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: it has none to look at
        return tuple(tensors)
    try:
        signature.bind(*parameters, *tensors)
    except TypeError as error:
        raise InputTypeError(f"{kind}: {name_of(function)}{signature} must take {wanted}: {error}") from None
    return tuple(tensors)


def call(kind: str, function: Function, *arguments: Tensor) -> Any:
    """What the function returns; what it raises becomes an InputError that names it."""
    if _is_tracing():
        return function(*arguments)
    try:
        return function(*arguments)
    except (AttnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"bias: {kind} {name_of(function)} failed: {first}. What it takes: {ADVICE}") from error


def check_result(
    kind: str, function: Function, value: Any, dtype: str, fits: bool, indices: tuple[Tensor, ...]
) -> None:
    """Raises InputTypeError or InputError where a result is no tensor of a dtype that fits, or does not broadcast."""
    if not isinstance(value, Tensor) or not fits:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputTypeError(f"bias: {kind} {name_of(function)} must return a {dtype} tensor, got {got}")
    rank = max([index.ndim for index in indices])
    if value.ndim > rank:
        raise InputError(
            f"bias: {kind} {name_of(function)} returned {value.ndim} dimensions for indices of {rank}"
            f" (shape {list(value.shape)}): {ADVICE}"
        )
    if _is_tracing():  # comparing sizes that may be symbolic would be guards
        return
    wanted = torch.broadcast_shapes(*[index.shape for index in indices])  # type: ignore[no-untyped-call]
    for axis in range(1, value.ndim + 1):
        size, fitting = value.shape[-axis], wanted[-axis]
        if size != 1 and size != fitting:
            name = AXES[-axis] if rank == 4 else f"dimension -{axis}"
            raise InputError(
                f"bias: {kind} {name_of(function)} returned shape {list(value.shape)}, which does not broadcast to"
                f" {list(wanted)}: {name} must be 1 or {fitting}, got {size}"
            )


def name_of(function: Any) -> str:
    """Its qualified name without what surrounds it: `lambda`s by their line."""
    if isinstance(function, Absent):
        return function.name
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    name = getattr(function, "__name__", None)
    if name is None:
        return type(function).__name__
    code = getattr(function, "__code__", None)
    if name == "<lambda>" and code is not None:
        return f"<lambda, line {code.co_firstlineno}>"
    return str(name)


# What it captures


def captured_tensors(function: Any) -> tuple[Tensor, ...]:
    """The tensors that it is seen to read: in its closure, defaults, globals by name and partial's arguments, in the
    functions that these are, in lists, tuples and dicts, and in the attributes of objects and nn.Modules.

    Not seen: what it looks up in another module (`tables.bias`), or makes while it runs.
    """
    found: dict[int, Tensor] = {}
    _look_into(function, found, set())
    return tuple(found.values())


def _look_into(value: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
        return
    if value is None or isinstance(value, (bool, int, float, str, bytes, type)) or id(value) in seen:
        return
    seen.add(id(value))
    for inner in _inside(value):
        _look_into(inner, found, seen)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers(), *vars(value).values()]
    if isinstance(value, FunctionType):
        if (value.__module__ or "").partition(".")[0] in ("torch", "attn_core"):
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        names = _names(value.__code__)
        of_globals = [value.__globals__[name] for name in names if name in value.__globals__]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *of_globals]
    if inspect.ismodule(value) or inspect.isbuiltin(value) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values()) if callable(value) else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> list[str]:
    """The names that it, and functions within it, look up."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _names(constant)
    return names


# Pickling


def as_picklable(owner: Any, function: Any) -> Any:
    """The function, or where it is found where its own name holds the bias that was made of it: decorated functions."""
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    held = _at(module, path) if module and path else None
    decorated = held is not None and type(held) is type(owner) and held.function is function
    return Decorated(module, path) if decorated else function


class Decorated:
    """A function under whose name there is the bias that it was made to."""

    def __init__(self, module: Any, path: Any) -> None:
        self.module, self.path = module, path


def from_picklable(value: Any) -> Any:
    """The function that `as_picklable` was given."""
    if not isinstance(value, Decorated):
        return value
    __import__(value.module)
    return _at(value.module, value.path).function


def _at(module: str, path: str) -> Any:
    value: Any = sys.modules.get(module)
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
