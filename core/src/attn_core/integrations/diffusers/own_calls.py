"""Models of diffusers that choose no backend: they call torch's scaled_dot_product_attention by themselves.

These are most of the older ones: UNets, autoencoders, Stable Diffusion 3, CogVideoX, AuraFlow. They reach it as
`F.scaled_dot_product_attention`, so a stand-in for `F` in diffusers' own modules redirects these models and nobody
else. diffusers imports the module of a model when that is first asked for, so what is imported later is seen to, too.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

#: Has the backends; torch's kernels among them are called by this name, and are to stay torch's.
DISPATCHER = "diffusers.models.attention_dispatch"

#: How it is written in diffusers.
CALLS = ("F.scaled_dot_product_attention(", "functional.scaled_dot_product_attention(")

#: Functional, and torch.nn, whose attribute it is.
_FUNCTIONAL, _NN = torch.nn.functional, torch.nn


class _StandIn(ModuleType):
    """A module that is another one, but for what is set on it."""

    def __init__(self, stands_for: ModuleType) -> None:
        super().__init__(stands_for.__name__, stands_for.__doc__)
        self.__dict__["_stands_for"] = stands_for

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"], name)


class OwnCalls(importlib.abc.MetaPathFinder):
    """Redirects them between `start` and `stop`; the next `start` redirects them to another function."""

    def __init__(self) -> None:
        self._functional, self._nn = _StandIn(_FUNCTIONAL), _StandIn(_NN)
        self._nn.functional = self._functional  # type: ignore[attr-defined]
        self._on = False

    def start(self, function: Callable[..., Any], is_chosen: Callable[[], bool]) -> None:
        """Has models call `function` from now on, whenever `is_chosen` says so."""

        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
            if is_chosen():
                return function(*args, **kwargs)
            return _FUNCTIONAL.scaled_dot_product_attention(*args, **kwargs)

        self._functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
        if not self._on:
            self._on = True
            sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and type(module) is ModuleType:
                self._replace(module, {id(_FUNCTIONAL): self._functional, id(_NN): self._nn})

    def stop(self) -> None:
        """Puts torch's modules back where the stand-ins still are."""
        self._on = False
        sys.meta_path.remove(self)
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and type(module) is ModuleType:
                self._replace(module, {id(self._functional): _FUNCTIONAL, id(self._nn): _NN})

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; a module of diffusers is seen to once it has run."""
        if not fullname.startswith("diffusers."):
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # that of its class again
                run(module)
                if self._on:
                    self._replace(module, {id(_FUNCTIONAL): self._functional, id(_NN): self._nn})

            loader.exec_module = exec_module
        return spec

    def _replace(self, module: ModuleType, by: dict[int, ModuleType]) -> None:
        """Gives the module's globals other modules, where it calls torch's attention itself."""
        names = [name for name, value in vars(module).items() if id(value) in by]
        if names and module.__name__ != DISPATCHER and _calls_it(module):
            for name in names:
                setattr(module, name, by[id(getattr(module, name))])


def is_redirected(name: str) -> bool:
    """Whether the module of diffusers of that name has a stand-in."""
    return any(type(value) is _StandIn for value in vars(sys.modules[name]).values())


def _calls_it(module: ModuleType) -> bool:
    """Whether its text has such a call."""
    source_of = getattr(module.__loader__, "get_source", None)
    source = source_of(module.__name__) if source_of else None
    return any(call in (source or "") for call in CALLS)
