"""What the autotuner found, by problem, for so many problems at most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any

#: Problems of a direction that are kept; the one that was not called for longest goes first.
KEPT = 256


class Cache:
    """The best configuration of each problem of one direction."""

    def __init__(self, size: int = KEPT) -> None:
        self.size = size
        self._lock = Lock()
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, problem: Hashable) -> Any | None:
        with self._lock:
            found = self._found.get(problem)
            if found is not None:
                self._found.move_to_end(problem)
            return found

    def put(self, problem: Hashable, configuration: Any) -> None:
        with self._lock:
            self._found[problem] = configuration
            self._found.move_to_end(problem)
            while len(self._found) > self.size:
                self._found.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._found.clear()

    def __len__(self) -> int:
        return len(self._found)


FORWARD = Cache()
BACKWARD = Cache()
