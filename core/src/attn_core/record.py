"""record(): which kernel served each call, how often, and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .calling_module import ModuleNames
from .device_time import DeviceTimes, events_for
from .errors import InputTypeError
from .problem import Problem
from .record_shown import as_html, as_table, as_text
from .scope import Scope, current, scope_for

if TYPE_CHECKING:
    from rich.table import Table

    from .kernel import Bound

_profiler_enabled = torch._C._autograd._profiler_enabled

#: Rows kept by one recorder; what comes after them is counted in one last row.
ROWS = 4096
OTHERS = "(others)"
STOCK = "torch (stock)"


@dataclass(kw_only=True)
class Row:
    """Calls of one problem served by one kernel, from one module where a model is recorded.

    `kernel` is a kernel's name, "torch (stock)" for a call that was handed to torch unchanged, or "(others)" for the
    sum of what came after the 4,096th row. `calls` and `seconds` are None for a choice made while a graph was traced:
    the graph runs without telling. `seconds` is wall time around the kernel; on CUDA, that of the device.
    """

    kernel: str
    problem: Problem | None
    adaptations: tuple[str, ...] = ()
    reason: str = ""  #: why the stock path was kept; of a traced choice, what was asked
    compiled: bool = False
    calls: int | None = 0
    seconds: float | None = 0.0
    module: str = ""  #: dotted name of the innermost module that called; empty where none of the model's did


class Recorder:
    """What `record()` yields: rows that can be iterated, printed and saved."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._lock = threading.Lock()
        self._device_times = DeviceTimes()
        self.modules = None if model is None else ModuleNames(model)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[Row]:
        """The rows, the ones that took longest first, traced choices last. Waits for the devices that are timed."""
        self._device_times.settle()
        with self._lock:
            rows = list(self._rows.values())
        return sorted(rows, key=lambda row: -1.0 if row.seconds is None else row.seconds, reverse=True)

    @property
    def kernels(self) -> dict[str, int]:
        """Calls per kernel; 0 for one that was only chosen in a traced graph."""
        counts: dict[str, int] = {}
        for row in self.rows():
            counts[row.kernel] = counts.get(row.kernel, 0) + (row.calls or 0)
        return dict(sorted(counts.items()))

    @property
    def by_module(self) -> dict[str, dict[str, int]]:
        """Name of a module -> calls per kernel, by name of the module; empty without a model."""
        found: dict[str, dict[str, int]] = {}
        for row in sorted(self.rows(), key=lambda row: row.module):
            if self.modules is not None and row.kernel != OTHERS:
                counts = found.setdefault(row.module, {})
                counts[row.kernel] = counts.get(row.kernel, 0) + (row.calls or 0)
        return found

    def module(self) -> str:
        """The module of the model that a call comes from now."""
        return "" if self.modules is None else self.modules.now()

    def row(self, kernel: str, problem: Problem | None, adaptations: tuple[str, ...] = (), reason: str = "") -> Row:
        """The row that counts calls of `problem` by `kernel` from where we are, made where it is new."""
        return self._row(
            Row(kernel=kernel, problem=problem, adaptations=adaptations, reason=reason, module=self.module())
        )

    def note_traced(self, kernel: str, adaptations: tuple[str, ...], call: str) -> None:
        """Adds the row of a choice made while a graph was traced; its lengths may be symbolic, so `call` is text."""
        self._row(
            Row(
                kernel=kernel,
                problem=None,
                adaptations=adaptations,
                reason=call,
                compiled=True,
                calls=None,
                seconds=None,
                module=self.module(),
            )
        )

    def _row(self, new: Row) -> Row:
        key: tuple[Any, ...] = new.kernel, new.problem, new.reason, new.compiled, new.module
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                if len(self._rows) >= ROWS:
                    key = OTHERS, None, "", new.compiled, ""
                    new = Row(kernel=OTHERS, problem=None, compiled=new.compiled, calls=new.calls, seconds=new.seconds)
                row = self._rows.setdefault(key, new)
        return row

    def count(self, row: Row, seconds: float) -> None:
        """Adds a call."""
        with self._lock:
            assert row.calls is not None
            assert row.seconds is not None
            row.calls += 1
            row.seconds += seconds

    def count_on_device(self, row: Row, start: Any, end: Any) -> None:
        """Adds a call whose seconds are between two events, to be read later."""
        self.count(row, 0.0)

        def tell(seconds: float) -> None:
            with self._lock:
                row.seconds = (row.seconds or 0.0) + seconds

        self._device_times.add(start, end, tell)

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain data, for JSON."""
        return [
            {
                **vars(row),
                "problem": None if row.problem is None else str(row.problem),
                "adaptations": list(row.adaptations),
            }
            for row in self.rows()
        ]

    def __str__(self) -> str:
        return as_text(self.rows())

    def __rich__(self) -> Table:
        return as_table(self.rows())

    def _repr_html_(self) -> str:
        """For notebooks."""
        return as_html(self.rows())


class record:  # noqa: N801  (reads as a verb: `with record() as calls`)
    """Within it, every eager call of this task is counted; choices made while a graph is traced are listed.

        with record() as calls:
            model(x)
        print(calls)

    With a model, rows have the name of the module that called:

        with record(model) as calls:
            model(x)
        print(calls.by_module)

    While a torch profiler runs, each call is a range with the kernel's name. Nothing is paid outside of the block.
    Memory is bounded, whatever the number of calls. Raises InputTypeError for a model that is no module.
    """

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, torch.nn.Module):
            raise InputTypeError(f"record: takes a module, got {type(model).__name__}")
        self._model = model
        self._entered: list[tuple[Token[Scope], Recorder]] = []

    def __enter__(self) -> Recorder:
        recorder = Recorder(self._model)
        outer = current.get()
        scope = scope_for(outer.settings, (*outer.recorders, recorder), outer.usages)
        if recorder.modules is not None:
            recorder.modules.watch()
        self._entered.append((current.set(scope), recorder))
        return recorder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        token, recorder = self._entered.pop()
        current.reset(token)
        if recorder.modules is not None:
            recorder.modules.release()


def recording(
    call: Bound,
    recorders: tuple[Recorder, ...],
    kernel: str,
    problem: Problem | None,
    adaptations: tuple[str, ...] = (),
    reason: str = "",
) -> Bound:
    """`call`, counted in `recorders`, in a row per module that it comes from."""
    #: Of recorders without a model, the one row of each; None where the module is to be asked at each call.
    fixed = [
        (recorder, recorder.row(kernel, problem, adaptations, reason) if recorder.modules is None else None)
        for recorder in recorders
    ]
    clock = time.perf_counter

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any) -> Any:
        rows = [
            (recorder, recorder.row(kernel, problem, adaptations, reason) if row is None else row)
            for recorder, row in fixed
        ]
        events = events_for(query.device)
        if events is not None:
            stream = torch.cuda.current_stream(query.device)
            events[0].record(stream)
        start = clock()
        if _profiler_enabled():
            with torch.profiler.record_function(kernel):
                result = call(query, key, value, bias)
        else:
            result = call(query, key, value, bias)
        seconds = clock() - start
        if events is not None:
            events[1].record(stream)
        for recorder, row in rows:
            if events is None:
                recorder.count(row, seconds)
            else:
                recorder.count_on_device(row, *events)
        return result

    return run
