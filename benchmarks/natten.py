"""What does neighborhood attention take here, and what by NATTEN itself?

Three others compute the same on a CPU:

- NATTEN 0.17.5, the last release with kernels of its own for CPUs; unfused alone: qk, softmax, av;
- NATTEN 0.21.7, which has FlexAttention for CPUs, eager and forward alone;
- torch's scaled_dot_product_attention with the dense boolean mask, which is made outside the timing.

Both releases have the name `natten`, so each contender is a process of its own, with its own path
(neighborhoods/contender.py). All are started once; then two take turns: one computes, the others wait. Every round has
a turn of each, in an order drawn anew, so that what the machine does meanwhile meets both alike; ours is compared with
the other round by round, and the median of these ratios is reported. A turn begins with a call that is not timed, which
fills the caches that another process has just had. Before anything is timed, results are compared.

A release that is not at hand is left out, and that is said; nox installs both (0.17.5 takes some minutes to compile,
the first time).

    nox -s bench -- natten [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from neighborhoods.contender import BOTH, FORWARD, FUSED, NEW, OLD, SDPA, THREADS, UNFUSED, Case
from timing import SEED, Finding, environment, report

#: Seconds that a turn lasts, about; where a single call takes longer, it is that.
TURN = 0.1
#: Between turns: threads of the one before may still spin, waiting for work that does not come.
PAUSE = 0.02
#: Of results, absolute; operands are standard normal, and float32.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: how many times as fast as `theirs` is `ours`, and how much it must be."""

    case: Case
    what: str
    theirs: str
    must: float | None = None
    ours: str = FUSED

    def __str__(self) -> str:
        sizes = self.case.kernel_size
        kernel_size = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        return f"{'x'.join(map(str, self.case.extents))}, k {kernel_size}, {self.what}, {self.ours}"


def case(extents: list[int], kernel_size: list[int]) -> Case:
    return Case(extents=extents, kernel_size=kernel_size, num_heads=4, head_dim=32, seed=SEED)


SMALL, LARGE, VIDEO = case([56, 56], [7, 7]), case([64, 64], [13, 13]), case([16, 32, 32], [3, 7, 7])
ROWS = (
    Row(case=SMALL, what=FORWARD, theirs=OLD, must=100.0),
    Row(case=SMALL, what=BOTH, theirs=OLD, must=80.0),
    Row(case=LARGE, what=FORWARD, theirs=OLD, must=180.0),
    Row(case=LARGE, what=BOTH, theirs=OLD),
    Row(case=SMALL, what=FORWARD, theirs=OLD, ours=UNFUSED, must=10.0),
    Row(case=SMALL, what=BOTH, theirs=OLD, ours=UNFUSED),
    Row(case=SMALL, what=FORWARD, theirs=NEW, must=80.0),
    Row(case=LARGE, what=FORWARD, theirs=NEW, must=80.0),
    Row(case=VIDEO, what=FORWARD, theirs=SDPA, must=6.0),
    Row(case=VIDEO, what=BOTH, theirs=SDPA),
)


class Contender:
    """A process that waits for its turn."""

    def __init__(self, name: str, folder: str | None) -> None:
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "neighborhoods" / "contender.py"), name],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, row: Row, **what: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"case": row.case._asdict(), "what": row.what, **what}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()} at: {row}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def difference(row: Row, contenders: dict[str, Contender]) -> float:
    """The largest between both results. Ends the program where it is more than rounding."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate((row.ours, row.theirs)):
            file = Path(folder) / str(number)
            contenders[name].ask(row, file=str(file))
            results.append(torch.load(file))
    largest = max(float((one - other).abs().max()) for one, other in zip(*results))
    if len(results[0]) != len(results[1]) or not largest <= TOLERANCE:
        raise SystemExit(f"{row}: differs from {row.theirs} by {largest:.2g}, more than {TOLERANCE:g}")
    return largest


def measure(row: Row, contenders: dict[str, Contender], rounds: int) -> Finding:
    """What part of their time ours is: the median over rounds, and half the distance between the quartiles."""
    largest = difference(row, contenders)
    pair = [contenders[row.ours], contenders[row.theirs]]
    calls = {each.name: max(1, int(TURN / statistics.median(each.ask(row, calls=3)))) for each in pair}
    taken: dict[str, list[float]] = {each.name: [] for each in pair}
    chance = random.Random(SEED)
    for _ in range(rounds):
        for each in chance.sample(pair, len(pair)):
            time.sleep(PAUSE)
            taken[each.name].append(statistics.median(each.ask(row, calls=calls[each.name])))
    # Limits are "at most": so it is the part of their time that is reported, and the ratio beside it.
    low, part, high = statistics.quantiles([100.0 * x / y for x, y in zip(*taken.values())], n=4)
    ours, theirs = (1e3 * statistics.median(times) for times in taken.values())
    must = "" if row.must is None else f", must be {row.must:g}"
    return Finding(
        name=str(row),
        value=part,
        unit="% of theirs",
        spread=(high - low) / 2,
        limit=None if row.must is None else 100.0 / row.must,
        note=f"{100.0 / part:.1f} times as fast{must}; {ours:.3g} ms, {theirs:.3g} ms; differ by {largest:.0e}",
    )


def run(rows: Sequence[Row], folders: dict[str, str | None], rounds: int) -> dict[str, list[Finding]]:
    """The findings, by whom ours is compared with."""
    from rich.progress import Progress

    contenders = {name: Contender(name, folders.get(name)) for name in names(rows)}
    sections: dict[str, list[Finding]] = {}
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("", total=len(rows))
            for row in rows:
                progress.update(task, description=f"{row}, beside {row.theirs}")
                finding = measure(row, contenders, rounds)
                sections.setdefault(f"beside {row.theirs}", []).append(finding)
                progress.print(f"{finding.name}, beside {row.theirs}: {finding.note}")
                progress.advance(task)
    finally:
        for contender in contenders.values():
            contender.end()
    return sections


def names(rows: Iterable[Row]) -> list[str]:
    """Of everybody who takes part."""
    return sorted({name for row in rows for name in (row.ours, row.theirs)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--only", default="", help="only rows whose name, or that of the other, holds this text")
    parser.add_argument("--natten-0.17", dest="old", metavar="FOLDER", help=f"where {OLD} is installed")
    parser.add_argument(
        "--natten-0.21", dest="new", metavar="FOLDER", help=f"where {NEW.split(' flex')[0]} is installed"
    )
    parser.add_argument("--json", help="a file to write all figures to")
    options = parser.parse_args()
    folders = {OLD: options.old, NEW: options.new}
    missing = [name for name, folder in folders.items() if folder is None]
    rows = [row for row in ROWS if row.theirs not in missing and options.only in f"{row}, {row.theirs}"]
    for name in missing:
        print(f"left out: {name}, which is not at hand; `nox -s bench -- natten` installs it")
    if not rows:
        raise SystemExit(f"--only: no row at hand has {options.only!r} in its name")
    for name, value in environment().items():
        print(f"{name}: {value}")
    print(f"batch 1, 4 heads, head_dim 32, float32, {THREADS} threads")
    report(run(rows, folders, options.rounds), options.json)


if __name__ == "__main__":
    main()
