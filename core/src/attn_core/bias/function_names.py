"""Names of functions that read nothing but their arguments and globals, for graphs, which hold text and tensors alone.

Two functions have one name where they do the same: the same code, defaults and globals. So a function that is written
down anew for each call, as a lambda is, is one graph. What a closure holds may be another thing at each call, and may
be a tensor: such a function has no name.

Names mean something in this process alone. What has one is kept for good: it holds neither tensors nor objects.
"""

from __future__ import annotations

import threading
from types import FunctionType
from typing import Any

from ..errors import InputError
from ..tracing import constant
from .base import _is_tracing
from .fields import Unwritable

#: What a default may be.
PLAIN = (type(None), bool, int, float, str, bytes)


class Nameless(Unwritable):
    why = (
        "function captures what it reads, or is made within the graph: define it outside, with the tensors that it"
        " reads as `tensors=`"
    )


_lock = threading.Lock()
_names: dict[Any, str] = {}
_functions: dict[str, Any] = {}


def name_for_graphs(function: Any) -> str | None:
    """The name of a function; None where it has none."""
    if type(function) is not FunctionType or function.__code__.co_freevars:
        return None
    # Of one that is made where a graph is traced little can be asked. Before Python 3.11, which those are is not told.
    if _is_tracing() and "<locals>" in getattr(function.__code__, "co_qualname", "<locals>"):
        return None
    return _name(function, function.__defaults__, function.__kwdefaults__)


@constant
def _name(function: FunctionType, defaults: tuple[Any, ...] | None, by_name: dict[str, Any] | None) -> str | None:
    """Of one without a closure; its defaults are told apart, so that a graph is guarded by them."""
    values = *(defaults or ()), *(by_name or {}).values()
    if not all(type(value) in PLAIN for value in values):
        return None
    same = function.__code__, id(function.__globals__), repr((defaults, sorted((by_name or {}).items())))
    name = _names.get(same)
    if name is None:
        with _lock:
            name = _names.setdefault(same, f"{function.__module__}:{function.__qualname__}#{len(_names)}")
            _functions.setdefault(name, function)
    return name


def function_of(name: str) -> Any:
    """The function of that name. Raises InputError where it is that of another process."""
    if name not in _functions:
        raise InputError(f"bias: the function {name} is not known here: a graph of it runs where it was made, alone")
    return _functions[name]
