"""Whether this thread runs a kernel: what a kernel calls of torch's attention itself is never redirected.

Without the mark, a kernel that calls F.scaled_dot_product_attention would be called by itself without end. It is a
thread-local, since a kernel runs in one thread from its beginning to its end, and since a traced graph can read one, by
guard: a kernel may be compiled. A graph may not set one, though, within a region that is checkpointed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .kernel import Bound

_is_tracing = torch.compiler.is_dynamo_compiling


class Running(threading.local):
    """What this thread runs."""

    def __init__(self) -> None:
        self.kernel = False


running = Running()


def marked(run: Bound) -> Bound:
    """`run`, with the mark. Where it is traced into a graph there is none: the tracer knows that it is in MARKED."""

    def marked_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any) -> Any:
        if _is_tracing():
            return run(query, key, value, bias)
        outer = running.kernel
        running.kernel = True
        try:
            return run(query, key, value, bias)
        finally:
            running.kernel = outer

    return marked_run


#: The code of every function that `marked` makes.
MARKED = marked(lambda query, key, value, bias: query).__code__


@contextmanager
def as_kernel() -> Iterator[None]:
    """The mark, for what a plugin runs beside its kernels: probes, limits, imports."""
    outer = running.kernel
    running.kernel = True
    try:
        yield
    finally:
        running.kernel = outer
