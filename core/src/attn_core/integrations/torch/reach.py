"""Whether a method calls torch's attention, and how it knows it: read off its code, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .functions import STOCK_SDPA

#: Names of torch that lead to attention, or past it.
NAMES = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward", "get_fastpath_enabled"})


def methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType, bool]]:
    """(name, function, whether it is the one that an instance calls) of every method, down to nn.Module's."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            continue
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                yield name, value, name not in seen
        seen.update(vars(base))


def calls_super(cls: type[nn.Module], name: str) -> bool:
    first = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
    return isinstance(first, FunctionType) and any("super" in code.co_names for code in _codes(first.__code__))


def beneath(function: FunctionType) -> Iterator[FunctionType]:
    """What `function` wraps."""
    wrapped = inspect.unwrap(function)
    if isinstance(wrapped, FunctionType) and wrapped is not function:
        yield wrapped


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _held(function: FunctionType) -> Iterator[Any]:
    """The values of the globals and of the outer variables that a function names."""
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _names(function: FunctionType) -> bool:
    return any(not NAMES.isdisjoint(code.co_names) for code in _codes(function.__code__))


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


def resolves(function: FunctionType) -> bool:
    """Whether what leads it there is a global or an outer variable, in all that it calls."""
    held = list(_held(function))
    if _names(function) and not any(is_attention(each) or _is_of_torch(each) for each in held):
        return False
    return all(resolves(each) for each in held if is_helper(function, each) and each is not function)


def _is_of_torch(value: Any) -> bool:
    return any(value is module for module in (torch, nn, F, torch.backends, torch.backends.mha))
