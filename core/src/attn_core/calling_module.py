"""Which module of a model a call comes from, while somebody records it.

Hooks on the modules keep a stack for each task. They are there within `record(model)` alone, so nobody else pays; and a
compiled graph does not notice a hook that comes after it, so none is traced again for them (one that was traced with
them is, once, when they are gone). While a graph is traced, what a hook does is done at once, as plain Python: the
choices made then have their module, too.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .tracing import constant

#: The modules whose forward this task is in, by id: (innermost, (the one around it, …)); None outside.
Inside = tuple[int, Any]

_inside: ContextVar[Inside | None] = ContextVar("attn_inside", default=None)


class ModuleNames:
    """The dotted names of the modules of one model, and the hooks that tell which of them a call comes from."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, str] = {}
        self._modules: list[nn.Module] = []  # kept, so that no id is another's meanwhile
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            self._names[id(module)] = as_written(name)
            self._modules.append(module)

    def watch(self) -> None:
        for module in self._modules:
            if runs_no_attention(module):
                continue
            hook = _Hook(id(module))
            self._hooks.append(module.register_forward_pre_hook(hook.enter, prepend=True))
            self._hooks.append(module.register_forward_hook(hook.leave, always_call=True))

    def release(self) -> None:
        """Takes the hooks out. A forward that was interrupted leaves its module behind; that is over now, too."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _inside.set(None if _inside.get() is None else self._without_mine(_inside.get()))

    def now(self) -> str:
        """The name of the innermost module of this model that this task is in; empty outside."""
        inside = _inside.get()
        while inside is not None:
            name = self._names.get(inside[0])
            if name is not None:
                return name
            inside = inside[1]
        return ""

    def _without_mine(self, inside: Inside | None) -> Inside | None:
        if inside is None:
            return None
        outer = self._without_mine(inside[1])
        return outer if inside[0] in self._names else (inside[0], outer)


class _Hook:
    """Of one module: notes that its forward begins and ends."""

    def __init__(self, module: int) -> None:
        self.module = module

    def enter(self, module: nn.Module, args: Any) -> None:
        _enter(self.module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        _leave(self.module)


@constant
def _enter(module: int) -> None:
    _inside.set((module, _inside.get()))


@constant
def _leave(module: int) -> None:
    inside = _inside.get()
    while inside is not None and inside[0] != module:  # those within that were interrupted
        inside = inside[1]
    if inside is not None:
        _inside.set(inside[1])


def as_written(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def runs_no_attention(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers that call nothing else (Linear, LayerNorm, GELU, …), or a script."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    torchs = type(module).__module__.startswith("torch.nn.modules.")
    return torchs and not isinstance(module, nn.MultiheadAttention) and next(module.children(), None) is None
