"""One harness for what takes microseconds.

Two figures taken one after the other differ by more than what is looked for here: clocks change, neighbours wake up.
So paths take turns in one process, on one core, in an order drawn anew each round; a path is compared with its
baseline round by round, and the median of those differences is reported. The first baseline is entered twice: what
its copy differs by is noise, and is printed.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the figures of a GPU are taken on machines that may lack it
    from rich.table import Table

SEED = 20261121
COPY = "the first baseline again"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a thing: `call` does it once, `within` what is entered before its clock starts.

    Those without `over` are baselines.
    """

    name: str
    call: Callable[[], object]
    over: str | None = None
    within: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure: what was measured, and the limit that it must keep. `unit` is of `value`, `spread` and `limit`."""

    name: str
    value: float
    unit: str
    spread: float | None = None  #: half the distance between the quartiles of the differences
    limit: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        return "" if self.limit is None else "met" if self.value <= self.limit else "MISSED"


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """A thing that others wrote, timed where limits were set and here: by its ratio a limit of time is carried over.

    A bound in microseconds says something of one machine alone, and there only while it is not busy.
    """

    name: str
    there: float
    here: float
    unit: str

    def limit(self, there: float) -> float:
        """The limit here that is as strict as `there` was on the machine on which it was set."""
        return there * self.here / self.there

    def __str__(self) -> str:
        return (
            f"limits are {self.here / self.there:.2f} times those of the machine on which they were set: there, "
            f"{self.name} takes {self.there:g} {self.unit}, here {self.here:.3g}"
        )


def on_one_core() -> None:
    """Keeps this process on one core, and torch on one thread."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def take_turns(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    calls: int,
    settle: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Microseconds per call of each contender, one figure per round, and of a copy of the first.

    Args:
        settle: called before a turn's clock starts and before it stops: on CUDA, what waits for the device.
        clock: seconds; `time.process_time` leaves out when others have the core, for what runs on one thread.
    """
    settle = settle or _nothing
    named = {contender.name: contender for contender in contenders} | {COPY: contenders[0]}

    def turn(name: str) -> float:
        with named[name].within():
            return _seconds(named[name].call, calls, settle, clock)

    order = list(named)
    for name in order:
        turn(name)  # caches, branch predictors, allocator
    chance = random.Random(SEED)
    taken: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            chance.shuffle(order)
            for name in order:
                taken[name].append(1e6 * turn(name) / calls)
    finally:
        gc.enable()
    return taken


def over(taken: Mapping[str, list[float]], name: str, baseline: str) -> tuple[float, float]:
    """`(median, spread)` of the differences between a contender and its baseline, in microseconds."""
    differences = [one - other for one, other in zip(taken[name], taken[baseline])]
    low, median, high = statistics.quantiles(differences, n=4)
    return median, (high - low) / 2


def _nothing() -> None:
    pass


def _seconds(
    call: Callable[[], object],
    calls: int,
    settle: Callable[[], object] = _nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    settle()
    start = clock()
    for _ in repeat(None, calls):
        call()
    settle()
    return clock() - start


def environment() -> dict[str, str]:
    """What the figures depend on and were taken with.

    Among it, what a call of an empty Python function takes: 30 to 40 ns on a free core. Where it is more,
    the machine is slower or busy, and microseconds are as much more; ratios to peers in the same run are not.
    """
    load = " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load before": load,
        "empty call": f"{1e9 * min(_seconds(_nothing, 100_000) for _ in range(20)) / 100_000:.0f} ns",
        "seed": str(SEED),
    }


def table(title: str, findings: Sequence[Finding]) -> Table:
    """Findings as a table; a limit is "at most"."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for column in ("", "value", "±", "unit", "limit", "", ""):
        drawn.add_column(column, justify="right" if column in ("value", "±", "limit") else "left")
    for finding in findings:
        drawn.add_row(
            finding.name,
            f"{finding.value:.2f}",
            "" if finding.spread is None else f"{finding.spread:.2f}",
            finding.unit,
            "" if finding.limit is None else f"{finding.limit:.4g}",
            finding.verdict,
            finding.note,
            style="red" if finding.verdict == "MISSED" else None,
        )
    return drawn


def report(
    sections: Mapping[str, Sequence[Finding]], json_file: str | None, yardsticks: Mapping[str, Yardstick] | None = None
) -> None:
    """Prints every section, under it what its limits were scaled by, then what missed its limit.

    All of it is written to `json_file` where one is given. `yardsticks` go by the headings of their sections.
    """
    yardsticks = yardsticks or {}
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, findings in sections.items():
        console.print(table(title, findings))
        if title in yardsticks:
            console.print(f"{yardsticks[title]}\n")
    missed = [f"{title}: {f.name}" for title, findings in sections.items() for f in findings if f.verdict == "MISSED"]
    console.print(f"missed: {'; '.join(missed)}" if missed else "every limit is met")
    if json_file is not None:
        data: dict[str, Any] = {
            "environment": environment(),
            "sections": {
                title: [asdict(f) | {"verdict": f.verdict} for f in findings] for title, findings in sections.items()
            },
            "yardsticks": {title: asdict(yardstick) for title, yardstick in yardsticks.items()},
        }
        Path(json_file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
