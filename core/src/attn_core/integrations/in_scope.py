"""A function of an integration's within a `prefer` scope of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch

from ..scope import prefer

Function = TypeVar("Function", bound=Callable[..., Any])


def scope_of(patterns: Collection[str] | str, strict: bool) -> prefer | None:
    """What `enable` was told to prefer; None where that is nothing. Raises what `prefer` raises."""
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return prefer(*names, strict=strict) if names or strict else None


def in_scope(run: Function, scope: prefer | None) -> Function:
    """`run` in that scope; itself where there is none."""
    if scope is None:
        return run
    patterns, strict = scope.patterns, scope.strict

    def in_its_scope(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which enters none that was made outside the graph
            with prefer(*patterns, strict=strict):
                return run(*args, **kwargs)
        with scope:
            return run(*args, **kwargs)

    return cast(Function, in_its_scope)
