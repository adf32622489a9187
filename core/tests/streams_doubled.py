"""A double of CUDA's streams on the CPU: work is queued in the current stream, and what sleeps is overtaken.

A stream that is awake runs an op at once, as an idle GPU does. One that sleeps keeps it until the program waits, while
work of other streams goes on, and reads what is in memory by then. Below autograd, so a backward is queued, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from attn_core.conformance import contract
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What memory holds until the op that writes it has run.
GARBAGE = 1e4


class Stream:
    """A queue of ops. One that sleeps runs none of them until it is waited for."""

    def __init__(self) -> None:
        self.sleeps = False
        self.queued: list[tuple[Callable[[], object], list[Tensor]]] = []  #: an op, and the tensors that it writes

    def finish(self) -> None:
        self.sleeps = False
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():  # as they were when queued
            while self.queued:
                run, written = self.queued.pop(0)
                with torch.autograd._unsafe_preserve_version_counter(tuple(written)):  # it was counted when queued
                    run()


class Streams(TorchDispatchMode):
    """What the kit uses of `torch.cuda`, for tensors on the CPU. Entered, it is where ops go."""

    def __init__(self) -> None:
        super().__init__()
        self._default = Stream()
        self._current, self._all = self._default, [self._default]

    def Stream(self) -> Stream:  # noqa: N802  (as torch names it)
        self._all.append(Stream())
        return self._all[-1]

    def default_stream(self) -> Stream:
        return self._default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def synchronize(self) -> None:
        for stream in self._all:
            stream.finish()

    def _sleep(self, cycles: int) -> None:
        self._current.sleeps = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stream = self._current
        if torch.Tag.data_dependent_output in op.tags:
            stream.finish()  # such as `.item()`: the program waits for the number
        if not stream.sleeps:
            return op(*args, **kwargs)
        given = _tensors((args, kwargs))
        if op._schema.is_mutable:
            stream.queued.append((lambda: op(*args, **kwargs), given))
            return args[0]
        made = op(*args, **kwargs)  # of what is in memory now: it has the shapes, and numbers that are not yet due
        new = [not any(_share_memory(tensor, one) for one in given) for tensor in _tensors(made)]  # a view is no work

        def run() -> None:
            for tensor, due, is_new in zip(_tensors(made), _tensors(op(*args, **kwargs)), new):
                if is_new:
                    tensor.copy_(due)

        for tensor, is_new in zip(_tensors(made), new):
            if is_new:
                tensor.fill_(GARBAGE)
        if any(new):
            stream.queued.append((run, _tensors(made)))
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


@contextmanager
def doubled_streams() -> Iterator[Streams]:
    """Within it, the CPU has streams for the kit."""
    with Streams() as streams, mock.patch.object(contract, "streams_of", return_value=streams):
        yield streams
