"""Whether a method calls torch's attention, and how it knows it: read off its code, without running it."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Set
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .functions import STOCK_SDPA

#: Names of torch that lead to attention, or past it. An integration that has its library call something else in its
#: place adds the name of that.
NAMES = {"scaled_dot_product_attention", "multi_head_attention_forward", "get_fastpath_enabled"}
#: Names by which classes that an integration made call attn already.
OURS: set[str] = set()
#: Steps of a code object that look a global up; what it imports within itself is none.
LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


def methods(cls: type[nn.Module]) -> Iterator[tuple[str, Any, bool]]:
    """(name, what the class has under it, whether it is what an instance finds) of all that can be called, down to
    nn.Module's own."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        for name, value in vars(base).items():
            if callable(value) or isinstance(value, (staticmethod, classmethod)):
                yield name, value, name not in seen
        seen.update(vars(base))


def function_of(value: Any) -> FunctionType | None:
    """The function of a method, static and class methods included; None where it is something else."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return function if isinstance(function, FunctionType) else None


def beneath(value: Any) -> FunctionType | None:
    """The function that an object wraps which is none itself."""
    try:
        wrapped = inspect.unwrap(value)
    except ValueError:  # wraps itself
        return None
    return wrapped if isinstance(wrapped, FunctionType) and wrapped is not value else None


def calls_super(cls: type[nn.Module], name: str) -> bool:
    """Whether what an instance of `cls` finds under `name` may call what its base classes have."""
    first = function_of(next(vars(base)[name] for base in cls.__mro__ if name in vars(base)))
    return first is None or any("super" in code.co_names for code in _codes(first.__code__))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.lru_cache(4096)
def _globals_named(code: CodeType) -> frozenset[str]:
    return frozenset(
        step.argval for each in _codes(code) for step in dis.get_instructions(each) if step.opname in LOADS
    )


def _held(function: FunctionType) -> Iterator[Any]:
    """The values of the globals and of the outer variables that a function names."""
    for name in _globals_named(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _names(function: FunctionType, names: Set[str] = NAMES) -> bool:
    return any(not names.isdisjoint(code.co_names) for code in _codes(function.__code__))


def calls_attn(function: FunctionType) -> bool:
    """Whether it was made to call attn."""
    return _names(function, OURS)


def is_attention(value: Any) -> bool:
    """Whether it is torch's function, or one that stands in for it."""
    return value is STOCK_SDPA or value is F.scaled_dot_product_attention or value is F.multi_head_attention_forward


def reaches(function: FunctionType, seen: set[int]) -> bool:
    """Whether it calls torch's attention: itself, or by functions of the same package that it names."""
    if id(function) in seen:
        return False
    seen.add(id(function))
    held = list(_held(function))
    if _names(function) or any(is_attention(value) for value in held):
        return True
    return any(reaches(each, seen) for each in held if is_helper(function, each))


def is_helper(function: FunctionType, value: Any) -> bool:
    """Whether `value` is a function that `function` may call and that is rebound with it: one of the same package."""
    if not isinstance(value, FunctionType):
        return False
    package = package_of(function.__module__)
    return package is not None and package_of(value.__module__) == package


def package_of(module: str | None) -> str | None:
    """The package that a module is of; None for torch's and ours, whose functions are never rebound as helpers."""
    package = (module or "").partition(".")[0]
    return None if package in ("", "torch", "attn_core") else package


def resolves(function: FunctionType, seen: set[int]) -> bool:
    """Whether what leads it there is a global or an outer variable, in all that it calls."""
    if id(function) in seen:
        return True
    seen.add(id(function))
    held = list(_held(function))
    if _names(function) and not any(is_attention(each) or _is_of_torch(each) for each in held):
        return False
    return all(resolves(each, seen) for each in held if is_helper(function, each))


def _is_of_torch(value: Any) -> bool:
    return any(value is module for module in (torch, nn, F, torch.backends, torch.backends.mha))
