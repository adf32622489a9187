"""Calibration: measures the kernels of this machine on small problems, and fits their constants to what they took.

Times are disturbed upwards alone, by whoever else is on the machine, so the least of several counts. The problems of
all kernels take turns: what slows the machine for a while then meets all of them.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from .bias import ALiBi, AttnBias, Causal, Mask, Neighborhood, RelPosTable, Segments, Window, as_bias
from .cost import Cost
from .costs_file import Calibration, device_name
from .door import HEADS_FIRST, examine
from .errors import InputError
from .kernel import Kernel
from .least_squares import relative_least_squares
from .plan import plan
from .problem import Problem
from .rates import Rates, Written
from .registry import registry

SEED = 20261121
#: Problems per kernel and direction, and what the longest may take by the estimate that is there so far.
PROBLEMS, LONGEST = 30, 40e-3
#: Seconds of measuring; and how often a problem is measured at least, unless that takes twice as long.
BUDGET, ROUNDS = 60.0, 3
#: What one figure is taken over, where a call takes less: a clock has limits.
LEAST = 1e-3

LENGTHS = (16, 32, 64, 96, 144, 256, 400, 576, 784, 1024, 1600, 2304, 3136, 4096)
SHAPES = ((1, 4, 64), (1, 8, 32), (2, 2, 64), (1, 16, 16), (1, 2, 128), (4, 4, 32), (1, 6, 64), (1, 1, 64), (2, 8, 16))

#: Every kind of bias that is measured, by a name: made for a length, by a generator.
KINDS: dict[str, Callable[[int, random.Random], AttnBias | Tensor | None]] = {
    "none": lambda seqlen, chance: None,
    "causal": lambda seqlen, chance: Causal("top-left"),
    "window": lambda seqlen, chance: Window(
        chance.randrange(1, max(2, seqlen // 3)), chance.choice((0, chance.randrange(1, max(2, seqlen // 3))))
    ),
    "boolean mask": lambda seqlen, chance: torch.rand(seqlen, seqlen) < 0.7,
    "additive mask": lambda seqlen, chance: torch.randn(seqlen, seqlen),
    "neighborhood": lambda seqlen, chance: _neighborhood(seqlen, chance),
    "segments": lambda seqlen, chance: Segments(
        _documents(seqlen, chance), within=chance.choice((None, Causal("top-left")))
    ),
    "one query": lambda seqlen, chance: None,
    "one query, boolean mask": lambda seqlen, chance: torch.rand(1, seqlen) < 0.7,
}
#: As in decoding. What a kernel takes per key and what per pair of query and key can be told apart only there: where
#: both lengths grow together, a little more of one looks like a little more of the other.
OF_ONE_QUERY = frozenset(kind for kind in KINDS if kind.startswith("one query"))


def _neighborhood(seqlen: int, chance: random.Random) -> Neighborhood | None:
    side = isqrt(seqlen)
    sizes = [size for size in (3, 5, 7, 9, 13) if size <= side]
    return (
        Neighborhood((side, seqlen // side), kernel_size=chance.choice(sizes)) if side**2 == seqlen and sizes else None
    )


def _documents(seqlen: int, chance: random.Random) -> list[int]:
    count = chance.randrange(1, max(2, seqlen // 12))
    cuts = sorted(chance.sample(range(1, seqlen), min(count, seqlen - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, seqlen])]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem to be measured, with its operands: heads-first, float32, on the CPU."""

    kind: str
    operands: tuple[Tensor, Tensor, Tensor]
    bias: AttnBias | None
    problem: Problem

    def prepared(self, kernel: str) -> Callable[[], object]:
        """A function that runs it once by this kernel: the forward, or both where a gradient is needed."""
        run = plan(*self.operands, self.bias, layout="heads-first", kernel=kernel, unchecked=True)
        operands, bias = self.operands, self.bias
        if not self.problem.requires_grad:
            return lambda: run(*operands, bias)
        grad_out = torch.randn(operands[0].shape)
        return lambda: torch.autograd.grad(run(*operands, bias), operands, grad_out)


def case(
    kind: str, bias: AttnBias | Tensor | None, batch: int, seqlen: int, num_heads: int, head_dim: int, *, grad: bool
) -> Case:
    """Attention of this size with random operands: of all tokens to all, or of one query to all."""
    queries = 1 if kind in OF_ONE_QUERY else seqlen
    lengths = (queries, seqlen, seqlen)
    query, key, value = (torch.randn(batch, num_heads, each, head_dim, requires_grad=grad) for each in lengths)
    given = as_bias(bias)
    problem, _ = examine(query, key, value, given, None, None, 0.0, False, HEADS_FIRST)
    return Case(kind=kind, operands=(query, key, value), bias=given, problem=problem)


def cases_for(kernel: Kernel, *, grad: bool, count: int = PROBLEMS, longest: float = LONGEST) -> list[Case]:
    """Problems that the kernel takes as they are, of every kind, short and long; [] where it takes none."""
    chance = random.Random(f"{SEED} {grad}")
    generator = torch.random.get_rng_state()
    torch.manual_seed(SEED)
    try:
        taken = [kind for kind in KINDS if _first(kernel, kind, grad)]
        found: list[Case] = []
        if not taken:
            return []
        for number in range(count):
            kind = taken[number % len(taken)]
            # Each kind gets every part of the range of lengths.
            place = (number // len(taken) + chance.random()) / (count / len(taken))
            batch, num_heads, head_dim = chance.choice(SHAPES)
            for seqlen in reversed(LENGTHS[: 1 + int(place * (len(LENGTHS) - 1) + 0.5)]):
                bias = KINDS[kind](seqlen, chance)
                if bias is None and kind == "neighborhood":  # no such grid
                    continue
                each = case(kind, bias, batch, seqlen, num_heads, head_dim, grad=grad)
                if not kernel.refusals(each.problem) and kernel.terms(each.problem).seconds(each.problem) <= longest:
                    found.append(each)
                    break
        return found
    finally:
        torch.random.set_rng_state(generator)


def _first(kernel: Kernel, kind: str, grad: bool) -> bool:
    """Whether the kernel takes such a bias at all, as it is."""
    seqlen = 64
    bias = KINDS[kind](seqlen, random.Random(SEED))
    return not kernel.refusals(case(kind, bias, 1, seqlen, 2, 32, grad=grad).problem)


def least_times(
    calls: Sequence[Callable[[], object]],
    budget: float,
    rounds: int = ROUNDS,
    tell: Callable[[float], None] = lambda share: None,
) -> list[float]:
    """Seconds of each call, the least of those measured: in `rounds` at least, and more while the budget lasts.

    `tell` is told which share of the budget is spent.
    """
    least, repeats = [], []
    start = time.perf_counter()
    for call in calls:
        call()  # tables, caches
        taken = _timed(call, 1)
        least.append(taken)
        repeats.append(max(1, min(20, round(LEAST / max(taken, 1e-9)))))
    order = list(range(len(calls)))
    chance = random.Random(SEED)
    collecting = gc.isenabled()
    gc.disable()
    try:
        done = 0
        while (spent := time.perf_counter() - start) < budget or (done < rounds and spent < 2 * budget):
            tell(min(1.0, spent / max(budget, 1e-9)))
            chance.shuffle(order)
            for place in order:
                least[place] = min(least[place], _timed(calls[place], repeats[place]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return least


def _timed(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


#: Constants of a Cost that are solved for.
CONSTANTS = ("call", "pair_dim", "pair", "token_dim", "token", "mask", "element", "part", "added")


def fit_cost(kernel: Kernel, measured: Sequence[tuple[Problem, float]], *, threads: int, source: str) -> Cost:
    """The kernel's constants by these times; those that no problem tells of stay as they are."""
    forward = [(problem, taken) for problem, taken in measured if not problem.needs_backward]
    both = [(problem, taken) for problem, taken in measured if problem.needs_backward]
    old = kernel.cost("cpu")
    found = _fitted(kernel, forward, old)
    nested = old.with_backward
    if both:
        nested = _fitted(kernel, both, nested or Cost(call=0.0))
        nested = replace(nested, backward=0.0, with_backward=None, threads=threads, source=source)
    return replace(found, with_backward=nested, threads=threads, source=source)


def _fitted(kernel: Kernel, measured: Sequence[tuple[Problem, float]], old: Cost) -> Cost:
    if not measured:
        return old
    rows = [kernel.quantities(problem) for problem, _ in measured]
    told = [name for name in CONSTANTS if any(row[name] for row in rows)]
    quantities = torch.tensor([[row[name] for name in told] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([taken for _, taken in measured], dtype=torch.float64)
    constants = relative_least_squares(quantities, seconds).tolist()
    values: dict[str, Any] = {name: _rounded(value) for name, value in zip(told, constants)}
    return replace(old, **values)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was measured of one kernel, and what became of its constants."""

    kernel: str
    before: Cost
    after: Cost
    problems: int
    error_before: tuple[float, float]  #: half, and nine tenths, of the estimates are off by at most this share
    error_after: tuple[float, float]


def fit_kernel(kernel: Kernel, measured: Sequence[tuple[Problem, float]], *, threads: int, source: str) -> Fit:
    """The kernel's constants by these times, and how far the estimates are off, before and after."""
    cost = fit_cost(kernel, measured, threads=threads, source=source)
    after = replace(kernel, costs={**kernel.costs, "cpu": cost})
    return Fit(
        kernel=kernel.name,
        before=kernel.cost("cpu"),
        after=cost,
        problems=len(measured),
        error_before=errors_of(kernel, measured),
        error_after=errors_of(after, measured),
    )


def errors_of(kernel: Kernel, measured: Sequence[tuple[Problem, float]]) -> tuple[float, float]:
    """By which share of the time half, and nine tenths, of the estimates are off at most."""
    off = sorted(abs(kernel.terms(problem).seconds(problem) / taken - 1) for problem, taken in measured)
    return off[(len(off) - 1) // 2], off[int(0.9 * (len(off) - 1))]


#: Kinds whose writing-out is measured, each by a bias for a length.
WRITTEN: dict[str, Callable[[int], AttnBias]] = {
    "Causal": lambda seqlen: Causal("top-left"),
    "Window": lambda seqlen: Window(seqlen // 8, seqlen // 8),
    "Neighborhood": lambda seqlen: Neighborhood((isqrt(seqlen), isqrt(seqlen)), kernel_size=3),
    "Segments": lambda seqlen: Segments([seqlen // 4] * 4),
    "ALiBi": lambda seqlen: ALiBi(4),
    "RelPosTable": lambda seqlen: RelPosTable(torch.zeros(1, 31), seqlen),
}
LENGTHS_WRITTEN = (16, 64, 144, 400, 784, 1296, 2304)


COPIED = tuple((1, 4, seqlen, 64) for seqlen in (16, 64, 256, 1024, 4096))


def rate_calls() -> list[Callable[[], object]]:
    """What tells the rates of adaptations: every kind written out, then copies."""
    calls: list[Callable[[], object]] = [
        partial(make(seqlen).bind(seqlen, seqlen).dense, "cpu", torch.float32)
        for make in WRITTEN.values()
        for seqlen in LENGTHS_WRITTEN
    ]
    return [*calls, *(partial(_copy_twice, torch.randn(shape)) for shape in COPIED)]


def fit_rates(taken: Sequence[float], *, threads: int, source: str) -> Rates:
    """The rates by the times of `rate_calls`."""
    written: dict[str, Written] = {}
    masks: list[Written] = []
    times = iter(taken)
    for kind, make in WRITTEN.items():
        bias = make(LENGTHS_WRITTEN[0])
        axes, heads = len(getattr(bias, "axes", (None,))), bias.batch_and_heads[1]
        call, element = _line([(float(seqlen**2 * axes * heads), next(times)) for seqlen in LENGTHS_WRITTEN])
        written[kind] = Written(call=_rounded(call / axes), element=element)
        if isinstance(bias, Mask):
            masks.append(written[kind])
    count = len(masks)  # a kind that is not measured is taken for one like these
    written["*"] = Written(
        call=_rounded(sum(rate.call for rate in masks) / count),
        element=_rounded(sum(rate.element for rate in masks) / count),
    )
    call, copy = _line([(4.0 * prod(shape), next(times)) for shape in COPIED])
    return Rates(call=call, copy=copy, written=written, threads=threads, source=source)


def _copy_twice(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """As expand_kv does to key and value."""
    return tensor.repeat_interleave(2, 1), tensor.repeat_interleave(2, 1)


def _line(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, per element) seconds."""
    quantities = torch.tensor([[1.0, elements] for elements, _ in measured], dtype=torch.float64)
    seconds = torch.tensor([taken for _, taken in measured], dtype=torch.float64)
    call, element = relative_least_squares(quantities, seconds).tolist()
    return _rounded(call), _rounded(element)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.3g}")


def kernels_to_measure(pattern: str = "*") -> list[Kernel]:
    """The kernels of that pattern that can run here on the CPU. Raises InputError where there are none."""
    found = [
        kernel
        for kernel in registry.kernels(pattern)
        if registry.condition(kernel).state in ("ready", "failed")
        and any({"cpu", "*"} & set(each.devices) for each in kernel.declarations)
    ]
    if not found:
        raise InputError(f"no kernel that matches {pattern!r} can run on this machine's CPU; `attn kernels` lists all")
    return found


def calibrate(
    pattern: str = "*", budget: float = BUDGET, tell: Callable[[float], None] = lambda share: None
) -> list[Fit | Rates]:
    """Measures the kernels of that pattern, and adaptations, and fits their constants.

    Raises InputError where no kernel of that pattern can run on the CPU.
    """
    kernels = kernels_to_measure(pattern)
    cases = [[each for grad in (False, True) for each in cases_for(kernel, grad=grad)] for kernel in kernels]
    calls = [each.prepared(kernel.name) for kernel, some in zip(kernels, cases) for each in some]
    taken = iter(least_times([*calls, *rate_calls()], budget, tell=tell))
    threads = torch.get_num_threads()
    source = gathered(()).source
    fits = [
        fit_kernel(kernel, [(each.problem, next(taken)) for each in some], threads=threads, source=source)
        for kernel, some in zip(kernels, cases)
        if some
    ]
    return [*fits, fit_rates(list(taken), threads=threads, source=source)]


def gathered(found: Sequence[Fit | Rates]) -> Calibration:
    """What was measured, as it is kept."""
    return Calibration(
        device="cpu",
        name=device_name(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        costs={each.kernel: each.after for each in found if isinstance(each, Fit)},
        rates=next((each for each in found if isinstance(each, Rates)), None),
    )
