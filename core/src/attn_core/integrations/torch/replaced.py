"""Attributes that are replaced while anybody needs it, and put back as the identical objects."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

from ...errors import IntegrationWarning


class Replaced:
    """One attribute of a module, and what `make(original)` puts in its place.

    For the same original it is the same replacement every time, so that compiled functions find their graphs again.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._make = make
        self._original: Any = None
        self._ours: Any = None
        #: Every pair made, (original, ours).
        self._made: list[tuple[Any, Any]] = []

    def put(self) -> None:
        found = getattr(self._owner, self._name)
        # Somebody who had replaced ours may have put it back since: what it stands for is the original.
        self._original = next((original for original, ours in self._made if ours is found), found)
        self._ours = next((ours for original, ours in self._made if original is self._original), None)
        if self._ours is None:
            self._ours = self._make(self._original)
            self._made.append((self._original, self._ours))
        setattr(self._owner, self._name, self._ours)

    def restore(self) -> str | None:
        """Puts the original back. Says what it left alone, since it is not ours any more; else None."""
        if getattr(self._owner, self._name) is self._ours:
            setattr(self._owner, self._name, self._original)
            return None
        return f"{self._owner.__name__}.{self._name}"


class Installation:
    """Attributes that are replaced together, as long as somebody holds them."""

    def __init__(self, make: Callable[[], list[Replaced]]) -> None:
        self._make = make
        self._replaced: list[Replaced] | None = None
        self._holders = 0
        self._lock = threading.Lock()

    @property
    def installed(self) -> bool:
        return self._holders > 0

    def hold(self) -> None:
        with self._lock:
            if self._replaced is None:
                self._replaced = self._make()
            if self._holders == 0:
                for each in self._replaced:
                    each.put()
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders or self._replaced is None:
                return
            left = [name for each in self._replaced if (name := each.restore()) is not None]
        for name in left:
            warnings.warn(
                f"{name} was replaced by somebody else after attn had replaced it: theirs is left in place. Ours, which"
                f" it may call, passes every call on to torch's",
                IntegrationWarning,
                stacklevel=4,
            )
