"""swap(): a model's attention by attn, without replacing anything of torch.

Each module whose class calls torch's attention gets a subclass: its methods have the same code, but look their names up
in a copy of their module's globals, in which torch's attention is attn's. Nothing else of the module changes: not its
parameters, buffers, hooks, or the keys of its state_dict.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...running import running
from .installation import Functions
from .reach import beneath, calls_attn, calls_super, function_of, is_attention, methods, package_of, reaches, resolves
from .redirection import Asked, Options
from .shadow import ShadowGlobals, shadow_module

_always = Options()


def _options() -> Options | None:
    return None if running.kernel else _always


def _asked() -> Asked | None:
    return None if running.kernel else _always.asked


class Swap:
    """What `swap` did: `remove()` undoes it, as does leaving a `with`.

    `swapped` maps the dotted names of modules to their classes, `left` the names of those that call torch's attention
    and were left alone to the reason.
    """

    def __init__(self) -> None:
        self.swapped: dict[str, type[nn.Module]] = {}
        self.left: dict[str, str] = {}
        self._changed: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []

    def _change(self, name: str, module: nn.Module, made: type[nn.Module]) -> None:
        original = type(module)
        try:
            module.__class__ = made
        except TypeError as error:
            self.left[name] = f"its class cannot be changed: {error}"
        else:
            self.swapped[name] = original
            self._changed.append((module, original, made))

    def remove(self) -> None:
        """Gives every module its class back; a second time, nothing happens."""
        for module, original, made in self._changed:
            if type(module) is made:
                module.__class__ = original
        self._changed = []

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: {cls.__name__}: swapped" for name, cls in self.swapped.items()]
        lines += [f"{name or '(the model)'}: left: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no module calls torch's attention"


def swap(model: nn.Module) -> Swap:
    """Has the modules of `model` run their attention by attn, whoever calls them and on whichever thread.

        handle = swap(model)
        print(handle)                       # what was swapped, and what was left, and why
        handle.remove()

    Reaches `scaled_dot_product_attention` of torch.nn.functional by whatever name a method, or a function of the same
    package that it calls, knows it, and nn.MultiheadAttention with `need_weights=False`. `isinstance` still holds, but
    `type(module) is …` does not. A copy or an unpickled one of a swapped model is swapped.

    Raises InputError where no module calls torch's attention, or none could be swapped; with the reasons.
    """
    handle = Swap()
    for shadow in list(_shadows.values()):
        shadow.refresh()
    for name, module in model.named_modules():
        made = _scripted(module) or swapped_class(type(module))
        if made is None:
            continue
        if isinstance(made, str):
            handle.left[name] = made
        elif "forward" in vars(module):
            handle.left[name] = "its forward was replaced on the instance"
        else:
            handle._change(name, module, made)
    if not handle.swapped:
        raise InputError(f"swap: nothing was swapped in {type(model).__name__}: {handle}")
    return handle


def _scripted(module: nn.Module) -> str | None:
    """Why nothing is swapped in a scripted or traced module, where its graph has torch's attention."""
    if not isinstance(module, torch.jit.ScriptModule) or not module._c._has_method("forward"):
        return None
    has_attention = "aten::scaled_dot_product_attention" in str(module.inlined_graph)
    return "is scripted or traced by torch.jit, which holds torch's own function" if has_attention else None


#: What is made of a class: another class, why there is none, or None where it does not call torch's attention.
Made: TypeAlias = "type[nn.Module] | str | None"
#: class -> (the code of its methods, which somebody may change, what was made of it).
_classes: dict[type[nn.Module], tuple[tuple[CodeType, ...], Made]] = {}
#: The other way round.
_originals: dict[type[nn.Module], type[nn.Module]] = {}


def swapped_class(cls: type[nn.Module]) -> Made:
    """The class that stands in for `cls`; why there is none; None where `cls` does not call torch's attention."""
    if cls in _originals:
        return "is swapped already"
    code = tuple(function.__code__ for _, value, _ in methods(cls) if (function := function_of(value)) is not None)
    known = _classes.get(cls)
    if known is None or known[0] != code:
        known = _classes[cls] = code, _make(cls)
        if isinstance(known[1], type):
            _originals[known[1]] = cls
    return known[1]


def is_swapped(module: nn.Module) -> bool:
    """Whether its class is one that stands in for another."""
    return type(module) in _originals


def _make(cls: type[nn.Module]) -> Made:
    reaching: dict[str, Any] = {}
    for name, value, first in methods(cls):
        function = function_of(value)
        if function is None:
            wrapped = beneath(value)
            if wrapped is not None and reaches(wrapped, set()):
                return f"{name} calls it beneath a decorator that is no function, which a swap does not see through"
        elif first and calls_attn(function):
            return "its class calls attn already"
        elif reaches(function, set()):
            if first:
                reaching[name] = value
            elif calls_super(cls, name):
                return f"{name} of a base class calls it, which {cls.__name__} calls by super()"
    if not reaching:
        return None
    if issubclass(cls, torch.fx.GraphModule):
        return "is a graph of torch.fx, which holds torch's own function"
    unseen = [name for name, value in reaching.items() if not resolves(cast(FunctionType, function_of(value)), set())]
    if unseen:
        return f"{unseen[0]} imports it within itself, or has it from an object, which a swap does not see"
    namespace: dict[str, Any] = {name: _rebound_method(value) for name, value in reaching.items()}
    namespace["__module__"], namespace["__qualname__"] = cls.__module__, cls.__qualname__
    namespace["__doc__"], namespace["__reduce_ex__"] = cls.__doc__, _reduce
    try:
        return types.new_class(cls.__name__, (cls,), {}, lambda names: names.update(namespace))
    except Exception as error:  # whatever its metaclass or __init_subclass__ asks
        return f"{cls.__name__} cannot be subclassed: {type(error).__name__}: {error}"


# Functions over globals in which torch's attention is attn's

_shadows: dict[int, ShadowGlobals] = {}


def _rebound_method(value: Any) -> Any:
    rebound: Any = _rebound(cast(FunctionType, function_of(value)))
    return type(value)(rebound) if isinstance(value, (staticmethod, classmethod)) else rebound


def _rebound(function: FunctionType) -> FunctionType:
    return _shadow_of(function.__globals__).rebound(function)


def _shadow_of(names: dict[str, Any]) -> ShadowGlobals:
    found = _shadows.get(id(names))
    if found is None:
        found = _shadows[id(names)] = ShadowGlobals(names, _instead_of)
        found.refresh()  # it is known by now: functions of two modules may name each other
    return found


def _instead_of(value: Any, module: str | None) -> Any:
    """What a swapped function of `module` finds where others find `value`."""
    if isinstance(value, ModuleType):
        return next((shadow for each, shadow in _modules() if each is value), value)
    if not isinstance(value, FunctionType) and not is_attention(value):
        return value
    if is_attention(value):
        return _functions().mha if value is F.multi_head_attention_forward else _functions().sdpa
    package = package_of(module)
    if package is not None and package_of(value.__module__) == package and reaches(value, set()):
        return _rebound(value)
    return value


@functools.cache
def _functions() -> Functions:
    return Functions(_options, _asked)


@functools.cache
def _modules() -> tuple[tuple[ModuleType, ModuleType], ...]:
    """Modules by way of which torch's attention may be named, each with its shadow."""
    functions = _functions()
    functional = functions.functional(scaled_dot_product_attention=functions.sdpa)
    backends = functions.backends
    torch_nn = shadow_module(nn, {"functional": functional})
    torch_itself = shadow_module(torch, {"nn": torch_nn, "backends": backends})
    return (
        (torch, torch_itself),
        (nn, torch_nn),
        (F, functional),
        (torch.backends, backends),
        (torch.backends.mha, backends.mha),
    )


# Copies and pickles


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Kept as the original class, swapped again: a class made here is found in no module."""
    if protocol < 2:
        raise InputError("swap: a swapped model is pickled with protocol 2 or newer; or remove() the swap before")
    made = next(cls for cls in type(module).__mro__ if cls in _originals)
    kept: Any = super(made, module).__reduce_ex__(protocol)
    how, arguments, *rest = kept
    if arguments[:1] != (made,):  # whoever made a class of ours into another has its own way
        return kept
    return _again, (how, _originals[made], *arguments[1:]), *rest


def _again(how: Callable[..., nn.Module], cls: type[nn.Module], *arguments: Any) -> nn.Module:
    made = swapped_class(cls)
    return how(made if isinstance(made, type) else cls, *arguments)
