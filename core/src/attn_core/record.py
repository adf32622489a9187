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

from .problem import Problem
from .scope import Scope, current, scope_for

if TYPE_CHECKING:
    from rich.table import Table

    from .kernel import Bound

#: Rows kept by one recorder; what comes after them is counted in one last row.
ROWS = 4096
OTHERS = "(others)"
STOCK = "torch (stock)"


@dataclass(kw_only=True)
class Row:
    """Calls of one problem served by one kernel.

    `kernel` is a kernel's name, "torch (stock)" for a call that was handed to torch unchanged, or "(others)" for the
    sum of what came after the 4,096th row. `calls` and `seconds` are None for a choice made while a graph was traced:
    the graph runs without telling. `seconds` is wall time around the kernel: on CUDA, that of the launch.
    """

    kernel: str
    problem: Problem | None
    adaptations: tuple[str, ...] = ()
    reason: str = ""  #: why the stock path was kept; of a traced choice, what was asked
    compiled: bool = False
    calls: int | None = 0
    seconds: float | None = 0.0


class Recorder:
    """What `record()` yields: rows that can be iterated, printed and saved."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Problem | None, str, bool], Row] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows())

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[Row]:
        """The rows, the ones that took longest first, traced choices last."""
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

    def row(self, kernel: str, problem: Problem | None, adaptations: tuple[str, ...] = (), reason: str = "") -> Row:
        """The row that counts calls of `problem` by `kernel`, made where it is new."""
        return self._row(Row(kernel=kernel, problem=problem, adaptations=adaptations, reason=reason))

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
            )
        )

    def _row(self, new: Row) -> Row:
        key = new.kernel, new.problem, new.reason, new.compiled
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                if len(self._rows) >= ROWS:
                    key = OTHERS, None, "", new.compiled
                    new = Row(kernel=OTHERS, problem=None, compiled=new.compiled, calls=new.calls, seconds=new.seconds)
                row = self._rows.setdefault(key, new)
        return row

    def count(self, row: Row, seconds: float) -> None:
        with self._lock:
            assert row.calls is not None
            assert row.seconds is not None
            row.calls += 1
            row.seconds += seconds

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
        lines = []
        for row in self.rows():
            calls = "traced" if row.compiled else f"{row.calls} calls, {1e3 * (row.seconds or 0):.3g} ms"
            extra = f" [{', '.join(row.adaptations)}]" if row.adaptations else ""
            reason = f" ({row.reason})" if row.reason else ""
            lines.append(f"{row.kernel}{extra}: {calls}: {row.problem or ''}{reason}")
        return "\n".join(lines) or "no calls"

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="what ran")
        for column in ("kernel", "calls", "ms", "problem", "adaptations"):
            table.add_column(column, justify="right" if column in ("calls", "ms") else "left")
        for row in self.rows():
            calls = "traced" if row.compiled else str(row.calls)
            ms = "" if row.seconds is None else f"{1e3 * row.seconds:.3g}"
            table.add_row(row.kernel, calls, ms, str(row.problem or row.reason), ", ".join(row.adaptations))
        return table


class record:  # noqa: N801  (reads as a verb: `with record() as calls`)
    """Within it, every eager call of this task is counted; choices made while a graph is traced are listed.

        with record() as calls:
            model(x)
        print(calls)

    Nothing is paid outside it. Memory is bounded, whatever the number of calls.
    """

    def __init__(self) -> None:
        self._entered: list[Token[Scope]] = []

    def __enter__(self) -> Recorder:
        recorder = Recorder()
        outer = current.get()
        scope = scope_for(outer.settings, (*outer.recorders, recorder), outer.usages)
        self._entered.append(current.set(scope))
        return recorder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        current.reset(self._entered.pop())


def recording(
    call: Bound,
    recorders: tuple[Recorder, ...],
    kernel: str,
    problem: Problem | None,
    adaptations: tuple[str, ...] = (),
    reason: str = "",
) -> Bound:
    """`call`, counted in `recorders`."""
    counted = [(recorder, recorder.row(kernel, problem, adaptations, reason)) for recorder in recorders]
    clock = time.perf_counter

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any) -> Any:
        start = clock()
        result = call(query, key, value, bias)
        seconds = clock() - start
        for recorder, row in counted:
            recorder.count(row, seconds)
        return result

    return run
