"""The search for the kernel and configuration in which a call takes the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from attn_core import Explanation, Neighborhood, NoKernelError, Verdict, explain_problem
from attn_core.errors import InputError

from ..autotuner.families import UNTUNABLE, Family, family_of
from ..autotuner.search import trials
from ..autotuner.timing import fastest
from .case import Case
from .result import Result, Trial

#: A kernel is left out whose estimate is so many times that of the best: it would take long and not win.
HOPELESS = 10.0
TAKES = ("chosen", "ready", "failed")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kernel that takes the case, and its configurations."""

    kernel: str
    seconds: float | None  #: estimated
    family: Family
    forward: tuple[Any, ...]
    backward: tuple[Any, ...]  #: empty where no gradient is wanted
    hopeless: bool = False  #: its estimate is far beyond the best

    @property
    def trials(self) -> int:
        return len(self.forward) + len(self.backward)


def candidates(case: Case, explanation: Explanation, *, thorough: bool = False) -> list[Candidate]:
    """The kernels that take the case, the best estimate first."""
    problem = case.problem()
    able = [verdict for verdict in explanation if verdict.state in TAKES]
    best = min((verdict.seconds for verdict in able if verdict.seconds), default=0.0)
    return [_candidate(case, verdict, best, problem, thorough) for verdict in able]


def _candidate(case: Case, verdict: Verdict, best: float, problem: Any, thorough: bool) -> Candidate:
    family = family_of(verdict.kernel, problem) or UNTUNABLE
    forward, backward = (
        tuple(family.configurations(problem, backward=direction, thorough=thorough)) for direction in (False, True)
    )
    return Candidate(
        kernel=verdict.kernel,
        seconds=verdict.seconds,
        family=family,
        forward=forward,
        backward=backward if case.backward else (),
        hopeless=bool(best and verdict.seconds and verdict.seconds > HOPELESS * best),
    )


def explained(case: Case, kernel: str | None = None) -> Explanation:
    """What every kernel says to the neighborhood of the case; only `kernel`, by name, where one is insisted on."""
    return explain_problem(case.problem(), kernel=kernel)


def optimize(
    case: Case,
    *,
    kernels: Sequence[str] = (),
    thorough: bool = False,
    warmup_steps: int = 5,
    steps: int = 5,
    begin: Callable[[int], None] = lambda trials: None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Result:
    """Times every kernel that takes the case, in each of its configurations; the least total wins.

    Args:
        kernels: only these, by name; then estimates leave none of them out.
        thorough: all configurations, not just the likely ones.
        warmup_steps, steps: runs of each configuration that are not timed, and that are.
        begin: told how many trials there will be at most.
        tell: told of each when it is over.

    Additional keys are a second attention, the same for all, and not timed.

    Raises UnknownKernelError for an unknown name, NoKernelError where no kernel is left that takes the case,
    InputError for numbers of steps out of range.
    """
    for name, number, fewest in (("warmup_steps", warmup_steps, 0), ("steps", steps, 1)):
        if type(number) is not int or number < fewest:
            raise InputError(f"{name}: takes an int >= {fewest}, got {number!r}")
    found = list(_asked(case, kernels, thorough))
    if not found:
        raise NoKernelError(f"no kernel takes {case}\n{explained(case)}")
    begin(sum(candidate.trials for candidate in found))
    ran: list[Trial] = []
    best: tuple[float, Candidate, Any, Any] | None = None
    for candidate in found:
        chosen: list[Any] = []
        total = 0.0
        for direction, configurations in (("forward", candidate.forward), ("backward", candidate.backward)):
            least = float("inf")
            for trial in _trials(case, candidate, direction, configurations, warmup_steps, steps):
                ran.append(trial)
                tell(trial)
                if trial.seconds < least:
                    least = trial.seconds
                    configuration = trial.configuration
            if least < float("inf"):
                chosen.append(configuration)
                total += least
            elif configurations:
                total = float("inf")  # none could run
        if total < float("inf") and (best is None or total < best[0]):
            best = total, candidate, chosen[0], chosen[1] if len(chosen) > 1 else None
    if best is None:
        raise NoKernelError(f"no configuration of {', '.join(c.kernel for c in found)} could run {case}")
    _, candidate, forward, backward = best
    return Result.of(case, candidate.kernel, forward, backward, ran)


def _asked(case: Case, kernels: Sequence[str], thorough: bool) -> Iterator[Candidate]:
    if not kernels:
        yield from (each for each in candidates(case, explained(case), thorough=thorough) if not each.hopeless)
        return
    for kernel in kernels:
        yield from candidates(case, explained(case, kernel), thorough=thorough)


def _trials(
    case: Case, candidate: Candidate, direction: str, configurations: Sequence[Any], warmup_steps: int, steps: int
) -> Iterator[Trial]:
    if not configurations:
        return
    backward = direction == "backward"
    asked = case.asked()
    with torch.no_grad():
        bias: Neighborhood = case.neighborhood()
        within = trials(asked, bias, candidate.kernel, candidate.family, backward=backward)
        for configuration in configurations:
            seen: list[float] = []
            fastest(
                [configuration],
                within,
                warmup_steps,
                steps,
                asked.device,
                lambda _, total: seen.append(total),  # noqa: B023  (called before the next round)
            )
            yield Trial(
                kernel=candidate.kernel, direction=direction, configuration=configuration, seconds=seen[0] / steps
            )
