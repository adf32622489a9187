"""Cut masks, kept for the next call with the same bias, within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from .runs import Grads, Operands

#: Bytes of masks that are kept; the least recently used are dropped first.
BOUND = 64 << 20
#: What a table without masks counts for: its Python objects.
LEAST = 4096


class Part(Protocol):
    """Some of the tiles of a mask, and how their operands are read."""

    def forward(self, operands: Operands) -> None: ...
    def backward(self, operands: Operands, grads: Grads) -> None: ...
    def tables(self) -> int: ...


@dataclass(frozen=True)
class Tiling:
    """A mask, cut: its parts, and whether they leave queries out or join results over several runs of keys."""

    parts: tuple[Part, ...]
    covers: bool  #: every query is in a run
    joins: bool  #: a query is in several runs


class Tables:
    """Tilings by key, least recently used first."""

    def __init__(self, bound: int = BOUND) -> None:
        self.bound = bound
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Tiling, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, cut: Callable[[], Tiling]) -> Tiling:
        """The tiling under `key`, by `cut` where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        tiling = cut()
        size = LEAST + sum(part.tables() for part in tiling.parts)
        if size > self.bound:
            return tiling
        with self._lock:
            if key not in self._kept:
                self._kept[key] = tiling, size
                self._bytes += size
            while self._bytes > self.bound:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._bytes -= dropped
        return tiling

    @property
    def nbytes(self) -> int:
        return self._bytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._bytes = 0


TABLES = Tables()
