"""Which module of a model a call comes from: while somebody records it, and for errors.

To record: hooks on the modules keep a stack for each task. They are there within `record(model)` alone, so nobody else
pays; and a compiled graph does not notice a hook that comes after it, so none is traced again for them (one that was
traced with them is, once, when they are gone). While a graph is traced, what a hook does is done at once, as plain
Python: the choices made then have their module, too.

For errors: the Python stack, which is there anyway.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from types import FrameType
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


@constant
def in_its_module(text: str) -> str:
    """`text` with the module before it whose forward asks for attention now: `blocks.0.attn (its class): text`.

    Unchanged outside of every module. The name is that within the outermost module that is running. Read off the
    stack, and, while a graph is traced, off the tracer's account of it: nothing is noted for it beforehand.
    """
    running, traced = _running(), _traced()
    if traced is not None:
        key, path, cls, at_hand = traced
        found = _name_of(key, [*running, *at_hand]) or (path, cls)
    elif running:
        found = _name_of(id(running[-1]), running) or ("", type(running[-1]))
    else:
        return text
    name, kind = as_written(found[0]), f"{found[1].__module__}.{found[1].__qualname__}"
    return f"{name} ({kind}): {text}" if name else f"{kind}: {text}"


def modules_at_hand() -> list[nn.Module]:
    """The modules that are running, the innermost first; then those that the tracer of a graph could name."""
    traced = _traced()
    return [*_running()[::-1], *(traced[3] if traced is not None else ())]


def _running() -> list[nn.Module]:
    """The modules with a method on the Python stack, the outermost first."""
    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        frame = frame.f_back
    return modules[::-1]


def _traced() -> tuple[int, str, type, list[nn.Module]] | None:
    """Of the innermost module in the graph that this thread traces: id, how the tracer reaches it, class; and modules
    that it may be part of. None where no graph is traced, or no module is called in it."""
    dynamo: Any = sys.modules.get("torch._dynamo.symbolic_convert")
    tracer = None if dynamo is None else getattr(dynamo.tls, "current_tx", None)
    if tracer is None or not (called := tracer.output.current_tx.nn_module_stack):
        return None
    key, (path, cls) = list(called.items())[-1]
    number = key.partition("@")[0]
    at_hand = [value for value in tracer.f_locals.values() if isinstance(value, nn.Module)]
    return int(number) if number.isdigit() else 0, path, cls, at_hand


def _name_of(key: int, modules: list[nn.Module]) -> tuple[str, type] | None:
    """Name and class of the module with that id, in the first of these that has it among its own."""
    for outer in modules:
        for name, module in outer.named_modules():
            if id(module) == key:
                return name, type(module)
    return None


def as_written(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def runs_no_attention(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers that call nothing else (Linear, LayerNorm, GELU, …), or a script."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    torchs = type(module).__module__.startswith("torch.nn.modules.")
    return torchs and not isinstance(module, nn.MultiheadAttention) and next(module.children(), None) is None
