"""Shadows: a stand-in for a module, in which some names are others, and functions that look their names up in it.

A module that holds such a shadow under the name `F` finds a function of ours in `F.scaled_dot_product_attention`, and
torch's own everywhere else: nothing of torch.nn.functional changes.

Forced by torch.compile: it reads the globals of a function through the module named in `__name__`, so that a function
over other globals needs a module of that name; and what stands in for a module must be one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any

PREFIX = "attn_core.integrations.torch.shadows"


def shadow_module(module: ModuleType, changes: Mapping[str, Any]) -> ModuleType:
    """A module that has `changes`, and for every other name what `module` has at that moment."""
    shadow = ModuleType(f"{PREFIX}.of_{module.__name__}", module.__doc__)
    shadow.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
    shadow.__dict__.update(changes)
    return shadow


class ShadowGlobals:
    """A copy of the globals of some functions, in which some values are others.

    `changes(value, module)` says what takes the place of a value that a function of that module names; it is asked for
    every global at each `refresh`.
    """

    def __init__(self, original: dict[str, Any], changes: Callable[[Any, str | None], Any]) -> None:
        self._original = original
        self._changes = changes
        self.module = ModuleType(f"{PREFIX}.g{id(original):x}_{original.get('__name__', '')}")
        self._rebound: dict[int, tuple[FunctionType, FunctionType]] = {}
        sys.modules[self.module.__name__] = self.module

    def refresh(self) -> None:
        """Takes the originals as they are now."""
        of = self._original.get("__name__")
        made = {name: self._changes(value, of) for name, value in self._original.items()}
        self.module.__dict__.update(made, __name__=self.module.__name__, __spec__=None, __loader__=None)

    def rebound(self, function: FunctionType) -> FunctionType:
        """`function`, its code the same, looking its names up here; the same one every time."""
        known = self._rebound.get(id(function))
        if known is not None and known[1].__code__ is function.__code__:
            return known[1]
        cells = [(cell, CellType() if _may_change(cell) else cell) for cell in function.__closure__ or ()]
        closure = tuple(ours for _, ours in cells) or None
        made = FunctionType(function.__code__, self.module.__dict__, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        made.__doc__, made.__qualname__, made.__module__ = function.__doc__, function.__qualname__, function.__module__
        made.__annotations__ = function.__annotations__
        self._rebound[id(function)] = function, made
        for cell, ours in cells:  # it is known by now: outer variables may lead back to it
            if ours is not cell:
                ours.cell_contents = self._changes(cell.cell_contents, function.__module__)
        return made


def _may_change(cell: CellType) -> bool:
    """Whether an outer variable is one that is changed; the others are shared with the original function."""
    try:
        return isinstance(cell.cell_contents, (ModuleType, FunctionType, BuiltinFunctionType))
    except ValueError:  # not filled yet
        return False
