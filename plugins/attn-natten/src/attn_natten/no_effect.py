"""Arguments of NATTEN's that change nothing here: each is said once, none is silently dropped."""

from __future__ import annotations

import warnings
from threading import Lock

from attn_core.tracing import constant

from .errors import NoEffectWarning

_lock = Lock()
_said: set[tuple[str, str]] = set()


@constant
def say_without_effect(function: str, name: str, why: str, stacklevel: int = 3) -> None:
    """Warns, once in a process for each function and argument; where a graph is traced, while it is.

    `stacklevel` is as for `warnings.warn`: 3 points at the caller of the function that calls this.
    """
    with _lock:
        if (function, name) in _said:
            return
        _said.add((function, name))
    warnings.warn(f"{function}: {name} has no effect here: {why}", NoEffectWarning, stacklevel=stacklevel)


def forget_what_was_said() -> None:
    """What has no effect is said again; for tests."""
    with _lock:
        _said.clear()
