"""bench_model(): runs a model in every way, checks what comes out, and times the ways against each other.

Times of two ways that are taken one after the other differ by more than the ways do. So they take turns, in an order
drawn anew each round, and each is compared with stock within its round; the median of those ratios counts. Stock takes
part twice: how far its second entry is from 1 is the noise.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable

import torch

from ..costs_file import device_name
from ..errors import InputError, KernelRefusedError, UnknownKernelError, suggestion
from ..kernel import Kernel
from ..record import record
from ..registry import registry
from .built import SEED, BuiltModel
from .memory import how_measured, peak_bytes
from .results import AGAIN, ATTN, EAGER, FORWARD, STOCK, TRAIN, Measured, Row
from .steps import Outcome, gradient_difference, outcome, output_difference, prepare, step_of
from .ways import left_alone, way

#: Of the figures of one turn: short steps are repeated for about as long.
SECONDS, REPEATS = 0.05, 20
#: A kernel that nobody runs for its speed: only where it is named.
ORACLE = "torch/reference"
#: What stands in a row of `record` for calls that no kernel ran.
NO_KERNEL = "torch (stock)"


def chosen_kernels(patterns: Collection[str], device: torch.device) -> list[Kernel]:
    """The kernels that match any of the patterns; without patterns, those that can run on the device at all.

    Raises UnknownKernelError for a pattern that matches none.
    """
    known = registry.kernels()
    if not patterns:
        ready = [kernel for kernel in known if registry.condition(kernel).state in ("ready", "failed")]
        declared = [k for k in ready if any({device.type, "*"} & set(each.devices) for each in k.declarations)]
        return [kernel for kernel in declared if kernel.name != ORACLE]
    found: dict[str, Kernel] = {}
    for pattern in patterns:
        matching = registry.kernels(pattern)
        if not matching:
            raise UnknownKernelError(
                f"no kernel matches {pattern!r}.{suggestion(pattern, [kernel.name for kernel in known])}"
                " `attn kernels` lists all"
            )
        found.update({kernel.name: kernel for kernel in matching})
    return [found[name] for name in sorted(found)]


def bench_model(
    built: BuiltModel,
    *,
    kernels: Collection[str] = (),
    steps: Iterable[str] = (FORWARD, TRAIN),
    rounds: int = 5,
    memory: bool = True,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> Measured:
    """Runs the model eagerly, as its library does, by attn, and by each kernel alone.

    The model's dropout is taken out of it, and no integration is enabled afterwards.

    Args:
        kernels: name patterns; none: every kernel that can run on the device.
        steps: "forward" (without gradients), "train" (forward and backward, in training mode), or both.
        rounds: how often each way is timed; 0: not at all.
        memory: whether to measure the peak of a step.
        tell: called with what is done now, and which share of everything is done.

    Raises UnknownKernelError for a pattern that matches no kernel; InputError where the model cannot be run on these
    inputs, not even by its own library.
    """
    chosen = chosen_kernels(kernels, built.device)
    prepare(built.model)
    measured = _measured(built, memory)
    kinds = tuple(steps)
    for number, kind in enumerate(kinds):

        def told(what: str, share: float, kind: str = kind, number: int = number) -> None:
            tell(f"{kind}: {what}", (number + share) / len(kinds))

        measured.rows += _Bench(built, kind, chosen, memory, told).rows(rounds)
    tell("measured", 1.0)
    return measured


def _measured(built: BuiltModel, memory: bool) -> Measured:
    import importlib_metadata

    return Measured(
        model=built.name,
        host=built.host,
        host_version=importlib_metadata.version(built.host),
        inputs=built.shapes,
        parameters=built.parameters,
        dtype=str(built.dtype).removeprefix("torch."),
        device=_device_name(built.device),
        seed=SEED,
        left_alone=left_alone(built),
        memory=how_measured(built.device) if memory else "not measured: it was not asked for",
    )


def _device_name(device: torch.device) -> str:
    """Which one it is, and how many threads the CPU works with: a time is one of this machine."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{device_name()}, {threads} thread{'s' if threads != 1 else ''}"


class _Bench:
    """The ways to do one kind of step."""

    def __init__(
        self,
        built: BuiltModel,
        kind: str,
        kernels: list[Kernel],
        memory: bool,
        tell: Callable[[str, float], None],
    ) -> None:
        self.built, self.device, self.kind, self.kernels = built, built.device, kind, kernels
        self.memory, self.tell = memory, tell
        self.step = step_of(built, kind)
        self.eager: Outcome | None = None

    def rows(self, rounds: int) -> list[Row]:
        ways = [EAGER, STOCK, ATTN, *(kernel.name for kernel in self.kernels)]
        units = len(ways) + rounds * (len(ways) + 1)  # nobody knows yet who refuses
        rows = []
        for number, by in enumerate(ways):
            self.tell(by, number / units)
            rows.append(self.checked(by))
        if rounds and any(row.by == STOCK and row.state == "ran" for row in rows):
            rows.append(Row(by=AGAIN, step=self.kind))
        self.timed({row.by: row for row in rows if row.state == "ran"}, rounds, len(ways) / units)
        self.eager = None
        return rows

    def checked(self, by: str) -> Row:
        """Runs it once and compares with eager; a row that says why, where it does not run."""
        row = Row(by=by, step=self.kind)
        kernel = next((kernel for kernel in self.kernels if kernel.name == by), None)
        condition = None if kernel is None else registry.condition(kernel)
        if condition is not None and condition.state not in ("ready", "failed"):
            fix = f" ({condition.fix})" if condition.fix else ""
            row.state, row.reason = "unavailable", f"{condition.reason}{fix}"
            return row
        try:
            with way(by, self.built), record() as calls:
                came = outcome(self.built, self.step)
            row.calls = calls.kernels
            if by not in (EAGER, STOCK) and not set(row.calls) - {NO_KERNEL}:
                row.state, row.reason = "refused", "no attention of this model goes through attn"
                return row
            if by == EAGER:
                self.eager = came
                with way(by, self.built):  # what a second run differs by: 0, unless the model has chance in it
                    came = outcome(self.built, self.step)
            if self.eager is not None:
                row.outputs = output_difference(came, self.eager)
                row.gradients = gradient_difference(came, self.eager)
            del came
            if self.memory:
                with way(by, self.built):
                    row.peak_bytes = peak_bytes(self.step, self.device)
        except KernelRefusedError as error:
            row.state, row.reason = "refused", str(error)
        except Exception as error:  # whatever a kernel or a model raises costs its row
            self._no_crash(row, error)
        finally:
            self.built.model.zero_grad(set_to_none=True)
        if row.state != "ran":
            gc.collect()  # tensors that the traceback held
        return row

    def _no_crash(self, row: Row, error: Exception) -> None:
        if row.by == STOCK and not isinstance(error, torch.OutOfMemoryError):
            raise InputError(
                f"{self.built.name} cannot be run on {self.built.shapes}: {type(error).__name__}: {error}"
            ) from error
        row.state, row.reason = "failed", f"{type(error).__name__}: {error}"
        row.peak_bytes = row.outputs = row.gradients = None

    def timed(self, turns: dict[str, Row], rounds: int, begun: float) -> None:
        """Fills the times in."""
        if not rounds:
            return
        chance = random.Random(SEED)
        for number in range(rounds):
            order = [by for by in turns if turns[by].state == "ran"]
            chance.shuffle(order)
            for place, by in enumerate(order):
                self.tell(
                    f"round {number + 1} of {rounds}, {by}",
                    begun + (1 - begun) * (number + place / len(order)) / rounds,
                )
                try:
                    with way(by, self.built):
                        turns[by].seconds.append(self.seconds())
                except Exception as error:  # as in `checked`
                    self._no_crash(turns[by], error)
            self.built.model.zero_grad(set_to_none=True)
        stock = turns[STOCK].seconds if STOCK in turns else []
        for row in turns.values():
            if row.state == "ran":
                row.seconds_median = statistics.median(row.seconds)
                if len(stock) == len(row.seconds):
                    row.of_stock = statistics.median(ours / theirs for ours, theirs in zip(row.seconds, stock))
            else:
                row.seconds.clear()

    def seconds(self) -> float:
        """Of one step, after one that is not timed: it may compile what entering a way made obsolete."""
        self.step()
        first = self._clocked(1)
        if first >= SECONDS:
            return first
        repeats = max(1, min(REPEATS, int(SECONDS / max(first, 1e-9))))
        return self._clocked(repeats) / repeats

    def _clocked(self, repeats: int) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(repeats):
                self.step()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        settle = getattr(getattr(torch, self.device.type), "synchronize", lambda: None)
        settle()
        started = time.perf_counter()
        for _ in range(repeats):
            self.step()
        settle()
        return time.perf_counter() - started
