"""Small tools for code that torch.compile traces. Nothing here imports dynamo, which takes a second."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def is_traced() -> bool:
    """Whether this call is being traced, by dynamo or as torch.export does without it.

    torch.compiler.is_compiling() alone is true for every thread while any of them compiles. Tracing without dynamo
    happens in modes of dispatch, which are a thread's own.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def constant(function: Function) -> Function:
    """Marks a function that runs as plain Python while a graph is traced, its result being a constant of the graph.

    The same as torch.compiler.assume_constant_result, which would import dynamo here and now.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def constants(facts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The facts of a bias with symbolic numbers made constants of the graph, at any depth."""
    made: list[Any] = []
    for fact in facts:
        if isinstance(fact, tuple):
            made.append(constants(fact))
        elif isinstance(fact, (int, torch.SymInt)) and not isinstance(fact, bool):
            made.append(operator.index(fact))
        else:
            made.append(fact)
    return tuple(made)


def _modes_before_dispatch() -> int:
    return int(torch._ops._len_torch_dispatch_stack_pre_dispatch())  # type: ignore[no-untyped-call]


@contextmanager
def without_modes() -> Iterator[None]:
    """None of the modes of torch that are in force here: for modules that are imported now, and stay.

    What a module makes at its import would else be a fake tensor, or one of inference, or on another device, for good.
    """
    with ExitStack() as left:
        if torch._C._len_torch_dispatch_stack() or _modes_before_dispatch():
            from torch.utils._python_dispatch import _disable_current_modes  # imports much; but so do modes

            left.enter_context(_disable_current_modes())
        left.enter_context(torch._C.DisableTorchFunction())
        if torch.is_inference_mode_enabled():
            left.enter_context(torch.inference_mode(False))
        yield


def has_static_value(number: float) -> bool:
    """Whether a size or a number is the same for the whole graph."""
    from torch.fx.experimental import symbolic_shapes  # only reached while tracing

    return symbolic_shapes.has_static_value(number)
