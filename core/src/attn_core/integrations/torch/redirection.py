"""Whether a call is redirected: asked at every call, of the task, then of the process.

Forced by two facts:
- An attribute of torch is the same for all threads and tasks, so what replaces it must ask who calls. Eager calls ask
  a ContextVar, which is their task's alone.
- A traced graph cannot read a ContextVar, but it can read an attribute of a thread-local, by guard. So the same is
  written there, as plain values, and a compiled function follows its *thread*.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...errors import IntegrationWarning
from ...running import MARKED, running
from ...scope import prefer as prefer_scope
from ...tracing import constant

_is_exporting = torch.compiler.is_exporting
_tracing_state = torch._C._get_tracing_state

#: What a graph is told: (patterns, strict).
Asked = tuple[tuple[str, ...], bool]


class Options:
    """How redirected calls choose their kernel."""

    def __init__(self, prefer: Collection[str] | str = (), strict: bool = False) -> None:
        patterns = (prefer,) if isinstance(prefer, str) else tuple(prefer)
        self.asked: Asked = (patterns, strict)
        #: The scope of each call; None where that is the one around it.
        self.prefer = prefer_scope(*patterns, strict=strict) if patterns or strict else None


class Entered:
    """One `with`, as its task and the tasks begun within it know it. They all forget it when it is left."""

    __slots__ = ("open", "options", "outer", "owner")

    def __init__(self, options: Options, outer: Entered | None, owner: object) -> None:
        self.options = options
        self.outer = outer
        self.owner = owner
        self.open = True


class Mirror(threading.local):
    """What this thread asked, as a traced graph can read it."""

    def __init__(self) -> None:
        self.asked: Asked | None = None


class Process:
    """What the process asked, by `enable`."""

    def __init__(self) -> None:
        self.options: Options | None = None
        self.asked: Asked | None = None

    def ask(self, options: Options | None) -> None:
        self.options = options
        self.asked = None if options is None else options.asked


process = Process()
mirror = Mirror()
_here: ContextVar[Entered | None] = ContextVar("attn_redirected", default=None)


def options_here() -> Options | None:
    """How an eager call of this task is redirected; None where it is not, as within a kernel."""
    if running.kernel:
        return None
    entered = _here.get()
    while entered is not None:
        if entered.open:
            return entered.options
        entered = entered.outer
    return process.options


def asked_here() -> Asked | None:
    """The same for code that is being traced."""
    if running.kernel:
        return None
    asked = mirror.asked
    return process.asked if asked is None else asked


def enter(owner: object, options: Options) -> None:
    """Redirects the calls of this task until `leave`."""
    _here.set(Entered(options, _here.get(), owner))
    _reflect()


def leave(owner: object) -> None:
    """Ends the latest that `owner` entered in this task. Raises RuntimeError where there is none."""
    entered = _here.get()
    found = entered
    while found is not None and not (found.open and found.owner is owner):
        found = found.outer
    if found is None:
        raise RuntimeError(f"{type(owner).__name__}: left in another task or thread than it was entered in")
    found.open = False
    while entered is not None and not entered.open:
        entered = entered.outer
    _here.set(entered)
    _reflect()


def _reflect() -> None:
    entered = _here.get()
    while entered is not None and not entered.open:
        entered = entered.outer
    mirror.asked = None if entered is None else entered.options.asked


def traced_scope(asked: Asked) -> AbstractContextManager[Any]:
    """What is entered around a traced call."""
    patterns, strict = asked
    return prefer_scope(*patterns, strict=strict) if patterns or strict else nullcontext()


@constant
def inside_traced_kernel() -> bool:
    """Whether what is being traced is a kernel's own code, where torch's attention is torch's.

    A flag that is set around the kernel would be a side effect of the graph, which a checkpointed region may not have;
    so the tracer is asked which functions it is in.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator  # it traces: it is there

    from ...trace import traced

    tracer: Any = InstructionTranslator.current_tx().output.current_tx
    while tracer is not None:
        if tracer.f_code is traced.__code__ or tracer.f_code is MARKED:
            return True
        tracer = getattr(tracer, "parent", None)
    return False


# Where torch's attention stays torch's

#: What was said, once each.
_said: set[str] = set()

HOST_TRACERS = {
    "torch.export": "an exported program runs without attn",
    "torch.jit.trace": "a traced module runs without attn",
    "torch.jit.script": "a scripted module runs without attn",
    "torch.fx": "a graph of torch.fx calls torch's own function",
}


def stays_stock(*operands: Any) -> str | None:
    """Who is recording this eager call for a program that runs elsewhere; None where nobody is."""
    if _is_exporting():
        return "torch.export"
    if _tracing_state() is not None:
        return "torch.jit.trace"
    for operand in operands:
        if type(operand) is not Tensor and not isinstance(operand, Tensor) and hasattr(operand, "node"):
            return "torch.fx"  # a Proxy stands for a tensor
    return None


def say_stock(tracer: str) -> None:
    """Warns, once per process for each tracer, that attention is not redirected in what it records."""
    if tracer not in _said:
        _said.add(tracer)
        warnings.warn(
            f"attention is not redirected under {tracer}: {HOST_TRACERS[tracer]}, so torch's attention is recorded",
            IntegrationWarning,
            stacklevel=3,
        )


@constant
def say_not_exported() -> None:
    """The same in a traced graph."""
    say_stock("torch.export")
