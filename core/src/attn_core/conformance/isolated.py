"""The checks in a process of their own: a kernel that crashes, hangs or ends the process costs one row.

The child writes a line before each row and one with its result after it. Where the second does not come, the row has
failed, and another child goes on behind it.

A row's time is that of the clock, since what hangs may well sleep, less that in which the child could have run and
others had the cores: on a busy machine, a slow row is no hang.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..registry import registry
from .checks import must_be_known
from .results import CheckResult
from .subject import must_be_here

#: Seconds that one row may take.
LIMIT = 120.0
#: A day; a hang that is waited for longer is not found by anybody.
LONGEST = 86_400.0
#: Seconds that a child may take to import torch and list its rows.
START = 300.0
#: After so many deaths the rest of a kernel's rows is not tried: each costs a new process.
DEATHS = 8


def check_isolated(
    kernel: str, *, device: str = "cpu", only: str | None = None, limit: float = LIMIT
) -> Iterator[CheckResult]:
    """As `check_kernel`, for a plugin's kernel by name, each result as it comes.

    Args:
        limit: seconds that one check of one case may take, but for those in which it waits for a core.

    Raises UnknownKernelError for an unknown name, InputError for an unknown check, a limit that is none and a device
    that is not here, before anything runs.
    """
    registry.kernel(kernel)
    must_be_known(only)
    must_be_here(device)
    if not 0 < limit <= LONGEST:
        raise InputError(f"limit: takes seconds above 0, {LONGEST:,.0f} at most, got {limit:g}")
    done = deaths = 0
    while True:
        last: dict[str, Any] = {"row": done, "check": "runs", "case": "", "problem": ""}
        told_of, faulted = True, False
        with _Child(kernel, device, only, done) as child:
            for told in child.lines(limit):
                if "result" in told:
                    told_of, done = True, told["row"] + 1
                    yield CheckResult(**told["result"])
                elif "row" in told:
                    last, told_of = told, False
                elif "fault" in told:
                    faulted = True
                elif "end" in told:
                    return
            reason = child.end()
        deaths += 1
        if not told_of:
            yield _failed(kernel, last, reason)
            done = last["row"] + 1
        elif not faulted:
            yield _failed(kernel, last | {"check": "runs", "case": ""}, reason)
            return  # it does not even list its rows
        if deaths == DEATHS:
            yield _failed(
                kernel, last | {"check": "runs", "case": ""}, f"{deaths} processes ended; the rest is not tried"
            )
            return


def _failed(kernel: str, row: dict[str, Any], reason: str) -> CheckResult:
    return CheckResult(
        kernel=kernel, check=row["check"], case=row["case"], status="failed", reason=reason, problem=row["problem"]
    )


def waited_for_a_core(pid: int) -> float:
    """Seconds in which a process could have run, and others had the cores; 0.0 where the system does not tell."""
    try:
        told = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii")  # on Linux: ns that it ran, ns that it waited
    except OSError:
        return 0.0
    return int(told.split()[1]) * 1e-9


class _Child:
    """A process that runs the rows from one on, and tells of them through a pipe."""

    def __init__(self, kernel: str, device: str, only: str | None, first: int) -> None:
        self._read, write = os.pipe()
        command = [sys.executable, "-m", __package__, kernel, device, only or "", str(first), str(write)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (a pipe would fill up)
        self._process = subprocess.Popen(
            command, pass_fds=(write,), env=environment, stdout=subprocess.DEVNULL, stderr=self._errors
        )
        os.close(write)
        self._late: float | None = None

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
        os.close(self._read)

    def lines(self, limit: float) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends or is silent for too long."""
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            allowed, began, waited = START, time.monotonic(), waited_for_a_core(self._process.pid)
            while True:
                others = waited_for_a_core(self._process.pid) - waited
                left = allowed + others - (time.monotonic() - began)
                if left <= 0:
                    self._late = limit
                    return
                if not selector.select(left):
                    continue  # in the meantime it may have waited again
                read = os.read(self._read, 1 << 16)
                if not read:
                    return
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    yield json.loads(line)
                allowed, began, waited = limit, time.monotonic(), waited_for_a_core(self._process.pid)

    def end(self) -> str:
        """How it ended, in words."""
        if self._late is not None:
            return f"did not end within {self._late:g} s"
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or [""]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process {how}{f': {last[0]}' if last[0] else ''}"
