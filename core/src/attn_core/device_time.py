"""Seconds that a device takes for the calls of a record, without waiting for it at each call.

A CUDA kernel runs after its launch has returned, so the clock of the host would time the launch. Events before and
behind each call are put on the stream instead, and read when somebody reads the rows. They are bounded: where many are
open, the oldest are read, for which the device is waited for if it must be.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

#: Calls whose events are not read yet, per record.
OPEN = 1024


def events_for(device: torch.device) -> tuple[Any, Any] | None:
    """Two events with time, to be recorded on the current stream of a CUDA device; None for any other device.

    None, too, while that stream captures a graph: what is captured does not run.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


class DeviceTimes:
    """Pairs of events that are not read yet, and whom to tell their seconds."""

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Any, Callable[[float], None]]] = deque()
        self._lock = threading.Lock()

    def add(self, start: Any, end: Any, tell: Callable[[float], None]) -> None:
        with self._lock:
            self._open.append((start, end, tell))
        if len(self._open) > OPEN:
            self._read(OPEN // 2)

    def settle(self) -> None:
        """Reads all of them; waits for the device."""
        self._read(0)

    def _read(self, left: int) -> None:
        while True:
            with self._lock:
                if len(self._open) <= left:
                    return
                start, end, tell = self._open.popleft()
            end.synchronize()
            tell(start.elapsed_time(end) * 1e-3)
