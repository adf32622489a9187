"""Small tools for code that torch.compile traces. Nothing here imports dynamo, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Marks a function that runs as plain Python while a graph is traced, its result being a constant of the graph.

    The same as torch.compiler.assume_constant_result, which would import dynamo here and now.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_static_value(number: float) -> bool:
    """Whether a size or a number is the same for the whole graph."""
    from torch.fx.experimental import symbolic_shapes  # only reached while tracing

    return symbolic_shapes.has_static_value(number)
