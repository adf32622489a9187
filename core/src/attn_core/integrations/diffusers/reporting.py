"""report(model): which modules of a model compute attention by attn as things stand, which do not, and why.

Nothing runs: what a module calls is read off its methods, or those of its processor, where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..reported import Report, ReportRow, by_torch
from . import calls
from .own_calls import is_redirected

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
NAMES = "AttentionBackendName"
SOFTMAX = ("softmax", "Softmax", "get_attention_scores")
_OURS = "attn"
NOT_ENABLED = 'attn is not enabled for diffusers; attn_core.enable("diffusers") does that'


def report(model: nn.Module) -> Report:
    """Which modules of the model compute attention by attn as things stand, and why the others do not."""
    rows = []
    for name, module in model.named_modules():
        answer = _answer(module)
        if answer is not None:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            processor = getattr(module, "processor", None)
            if processor is not None:
                kind = f"{kind} with {type(processor).__name__}"
            rows.append(ReportRow(module=name, kind=kind, redirected=answer[0], reason=answer[1]))
    return Report(rows=tuple(rows))


def _answer(module: nn.Module) -> tuple[bool, str] | None:
    """(whether attn computes it, why or why not); None for a module without attention."""
    if isinstance(module, nn.MultiheadAttention):
        return by_torch(module, "torch's own module, not diffusers'")
    processor = getattr(module, "processor", None)
    cls = type(module if processor is None else processor)
    if cls.__module__.startswith("torch.nn."):  # nn.Softmax belongs to whoever uses it
        return None
    names = {name for code in _codes(cls) for name in code.co_names}
    if DISPATCH in names:
        return _of_the_dispatcher(processor if processor is not None else module, names)
    if SDPA in names:
        return _of_its_own_call(module, cls)
    if processor is not None:
        return False, f"{cls.__name__} computes by itself: it calls neither diffusers' backends nor torch's attention"
    if names & set(SOFTMAX):
        return False, "it takes the softmax by itself"
    return None


def _of_the_dispatcher(chooser: Any, names: set[str]) -> tuple[bool, str]:
    if NAMES in names:
        return False, "its code names the backend that it needs"
    if calls.state is None:
        return False, NOT_ENABLED
    chosen = getattr(chooser, "_attention_backend", None)
    if chosen is None:
        return _if_active("")
    if chosen != calls.state.member:
        return False, f"it is set to the backend {_text(chosen)!r}; model.set_attention_backend({_OURS!r}) changes that"
    return True, "by its name"


def _of_its_own_call(module: nn.Module, cls: type) -> tuple[bool, str]:
    if cls.__module__.partition(".")[0] != "diffusers":
        return by_torch(module, "calls torch's attention in code that is not diffusers'")
    if calls.state is None:
        return False, NOT_ENABLED
    if not is_redirected(cls.__module__):
        return by_torch(module, "calls torch's attention by a name that is not redirected")
    return _if_active("by its own call of torch's attention")


def _if_active(word: str) -> tuple[bool, str]:
    assert calls.state is not None
    active = calls.state.module._AttentionBackendRegistry._active_backend
    if active != calls.state.member:
        return False, f"it chooses no backend, and the active one is {_text(active)!r}, not {_OURS!r}"
    return True, word


def _text(backend: Any) -> str:
    return str(getattr(backend, "value", backend))


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of the methods of a class and of what it derives from, but for their making."""
    hidden: set[str] = {"__init__"}
    for owner in cls.__mro__:
        if owner is nn.Module:
            break
        for name, member in vars(owner).items():
            code = getattr(getattr(member, "__func__", member), "__code__", None)
            if code is not None and name not in hidden:
                yield from _within(code)
        hidden |= vars(owner).keys()


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)
