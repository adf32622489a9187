"""Is the kernel that is chosen the fastest?

Problems are drawn by a seed: five kinds of bias, forward alone and with backward, one and two threads, 64 to 4,096
tokens. By the estimates, at least half of them lie within a factor of 4 of a crossover; how many do by the times is
told as well. Every kernel that may be the fastest runs each problem, in turns, a mask being written out in the call
where the kernel needs that; what counts are medians. A kernel is left out where its estimate is over 8 times the best
one, unless something here would choose it.

Chosen by the shipped constants, and by those that `attn calibrate` finds in this process, beside three simple rules.

    nox -s bench -- ranking [--part shipped|calibrated] [--problems N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from attn_core import AttnBias, Causal, Neighborhood, Segments, Window, explain_problem
from attn_core.calibration import Case, calibrate, case, gathered
from attn_core.costs_file import Calibration, device_name
from attn_core.explain import Explanation
from attn_core.registry import registry
from timing import SEED, Finding, environment, report

#: How many in a hundred problems are of each kind.
KINDS = {"none": 12, "causal": 14, "window": 30, "neighborhood": 22, "segments": 22}
SHORTEST, LONGEST = 64, 4096
CLOSE, CLOSE_SHARE = 4.0, 0.6
#: The time of the chosen kernel that is as good as the best.
AS_GOOD = 1.25
#: Limits, in percent: problems whose kernel is not as good, and time lost against always the best.
MISSES, LOST = 3.0, 2.0
#: Kernels that are measured: those whose estimate is at most so many times the best.
WORTH = 8.0
#: Seconds by the estimate of the best kernel, and of any that is measured.
LONGEST_BEST, LONGEST_ANY = 0.06, 0.6
ROUNDS, SLOW_ROUNDS, LEAST = 9, 5, 1e-3
RULES = ("always torch/flash", "always torch/tiled", "torch/tiled from 1,024 tokens on")


@dataclass
class Measured:
    """A problem, what chose which kernel, and what each took."""

    threads: int
    case: Case
    estimates: dict[str, float]
    chosen: dict[str, str] = field(default_factory=dict)  #: by what chose
    seconds: dict[str, float] = field(default_factory=dict)  #: by kernel
    left_out: tuple[str, ...] = ()

    @property
    def best(self) -> float:
        return min(self.seconds.values())

    @property
    def is_close(self) -> bool:
        """By its times, two kernels lie within a factor of 4."""
        first, *others = sorted(self.seconds.values())
        return bool(others) and others[0] <= CLOSE * first

    def over_best(self, by: str) -> float:
        return self.seconds[self.chosen[by]] / self.best


def draw(chance: random.Random, kind: str) -> tuple[AttnBias | None, int]:
    """A bias of that kind, and the length."""
    seqlen = round(math.exp(chance.uniform(math.log(SHORTEST), math.log(LONGEST))))
    if kind == "causal":
        return Causal("top-left"), seqlen
    if kind == "window":
        left = round(math.exp(chance.uniform(0, math.log(seqlen / 2))))
        return Window(left, chance.choice((0, left, left // 4))), seqlen
    if kind == "neighborhood":
        if chance.random() < 0.25:
            return Neighborhood(seqlen, kernel_size=chance.choice([k for k in (7, 15, 31, 63) if k <= seqlen])), seqlen
        side = max(8, round(seqlen**0.5))
        sizes = [size for size in (3, 5, 7, 9, 11, 13) if size <= side]
        return Neighborhood((side, side), kernel_size=chance.choice(sizes)), side * side
    if kind == "segments":
        count = round(math.exp(chance.uniform(math.log(2), math.log(seqlen / 8))))
        cuts = sorted(chance.sample(range(1, seqlen), count - 1))
        sizes = [end - start for start, end in zip([0, *cuts], [*cuts, seqlen])]
        return Segments(sizes, within=chance.choice((None, Causal("top-left")))), seqlen
    return None, seqlen


def problems(count: int) -> list[Measured]:
    """The problems, the same for the same seed and shipped constants."""
    chance = random.Random(SEED)
    torch.manual_seed(SEED)
    registry.use_costs(None)
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    found: list[Measured] = []
    close = 0
    while len(found) < count:
        threads, grad, kind = chance.choice((1, 2)), chance.random() < 0.5, chance.choice(kinds)
        bias, seqlen = draw(chance, kind)
        batch, heads, dim = (
            chance.choice((1, 1, 2, 4)),
            chance.choice((1, 2, 4, 8, 12)),
            chance.choice((16, 32, 64, 128)),
        )
        torch.set_num_threads(threads)
        # Weighed by sizes alone first: operands of what is far too long need not be made.
        if batch * heads * seqlen * seqlen > 40e6 * LONGEST_BEST / 0.06 * 8:
            continue
        each = case(kind, bias, batch, seqlen, heads, dim, grad=grad)
        estimates = estimated(explain_problem(each.problem))
        best, *others = sorted(estimates.values())
        if best > LONGEST_BEST or others[0] > LONGEST_ANY:
            continue
        is_close = others[0] <= CLOSE * best
        # The last of them make up for what is missing of those that are close.
        if not is_close and count - len(found) <= math.ceil(CLOSE_SHARE * count) - close:
            continue
        close += is_close
        found.append(Measured(threads=threads, case=each, estimates=estimates))
    return found


def estimated(explanation: Explanation) -> dict[str, float]:
    """Seconds by kernel, of those that take the problem."""
    return {v.kernel: v.seconds for v in explanation if v.seconds is not None}


def by_rule(rule: str, each: Measured) -> str:
    """What a simple rule chooses; where that kernel does not take the problem, the other."""
    wanted = "torch/flash"
    if rule == RULES[1] or (rule == RULES[2] and each.case.problem.seqlen_q >= 1024):
        wanted = "torch/tiled"
    return wanted if wanted in each.estimates else "torch/flash"


def measure(each: Measured) -> None:
    """Runs the problem by every kernel that may be the best, or that something chooses, in turns."""
    torch.set_num_threads(each.threads)
    least = min(each.estimates.values())
    wanted = set(each.chosen.values())
    wanted |= {name for name, seconds in each.estimates.items() if seconds <= min(WORTH * least, LONGEST_ANY)}
    each.left_out = tuple(sorted(set(each.estimates) - wanted))
    calls = {name: each.case.prepared(name) for name in sorted(wanted)}
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(20, round(LEAST / taken(call, 1))))
    once = sum(taken(call, 1) for call in calls.values())
    order, times = list(calls), {name: [] for name in calls}
    chance = random.Random(SEED)
    for _ in range(ROUNDS if once < 0.1 else SLOW_ROUNDS):
        chance.shuffle(order)
        for name in order:
            times[name].append(taken(calls[name], repeats[name]))
    each.seconds = {name: statistics.median(some) for name, some in times.items()}


def taken(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def figures(found: Sequence[Measured], by: str) -> tuple[float, float]:
    """`(misses, lost)` in percent: problems whose kernel is not as good as the best, and time lost in all."""
    misses = sum(each.over_best(by) > AS_GOOD for each in found)
    lost = sum(each.seconds[each.chosen[by]] for each in found) / sum(each.best for each in found) - 1
    return 100 * misses / len(found), 100 * lost


def findings(found: Sequence[Measured], part: str) -> list[Finding]:
    """What one set of constants achieves, and whether it beats every rule."""
    misses, lost = figures(found, part)
    rules = {rule: figures(found, rule) for rule in RULES}
    rows = [
        Finding(name=f"chosen over {AS_GOOD} x the best", value=misses, unit="% of problems", limit=MISSES),
        Finding(name="time lost against always the best", value=lost, unit="%", limit=LOST),
    ]
    for rule, (its_misses, its_lost) in rules.items():
        beaten = "beaten" if misses < its_misses and lost < its_lost else "NOT BEATEN"
        rows.append(Finding(name=f"{rule}: over {AS_GOOD} x", value=its_misses, unit="% of problems", note=beaten))
        rows.append(Finding(name=f"{rule}: time lost", value=its_lost, unit="%"))
    groups: dict[str, list[Measured]] = {}
    for each in found:
        direction = "forward + backward" if each.case.problem.requires_grad else "forward"
        for group in (f"{each.threads} thread{'s'[: each.threads - 1]}", direction, each.case.kind):
            groups.setdefault(group, []).append(each)
    for group, some in sorted(groups.items()):
        misses, lost = figures(some, part)
        note = f"{len(some)} problems, {lost:.2f} % of time lost"
        rows.append(Finding(name=f"of these, {group}: over {AS_GOOD} x", value=misses, unit="% of problems", note=note))
    return rows


def told(each: Measured, part: str) -> str:
    best = min(each.seconds, key=each.seconds.__getitem__)
    return (
        f"  {each.over_best(part):.2f} x  {each.chosen[part]} for {best}, {each.threads} threads: {each.case.problem}\n"
        f"    measured {shown(each.seconds)}; estimated {shown(each.estimates)}"
    )


def shown(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in sorted(seconds.items(), key=lambda x: x[1]))


def row(each: Measured) -> dict[str, Any]:
    return {
        "problem": str(each.case.problem),
        "threads": each.threads,
        "ms": {name: float(f"{1e3 * seconds:.4g}") for name, seconds in each.seconds.items()},
        "chosen": {by: name for by, name in each.chosen.items() if by not in RULES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("shipped", "calibrated"), help="only these constants; default: both")
    parser.add_argument("--problems", type=int, default=200, metavar="N")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="of calibrating")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    start = time.perf_counter()
    parts = [options.part] if options.part else ["shipped", "calibrated"]
    threads = torch.get_num_threads()
    constants: dict[str, Calibration | None] = {"shipped": None}
    if "calibrated" in parts:
        registry.use_costs(None)
        constants["calibrated"] = gathered(calibrate(budget=options.budget))
        print(f"calibrated with {threads} threads, {time.perf_counter() - start:.0f} s", flush=True)
    found = problems(options.problems)
    for part in parts:
        registry.use_costs(constants[part])
        for each in found:
            torch.set_num_threads(each.threads)
            chosen = explain_problem(each.case.problem).chosen
            assert chosen is not None
            each.chosen[part] = chosen
    registry.use_costs(None)
    for each in found:
        each.chosen |= {rule: by_rule(rule, each) for rule in RULES}
    gc.disable()
    for number, each in enumerate(sorted(found, key=lambda each: each.threads), 1):
        measure(each)
        if number % 20 == 0:
            print(f"{number} problems, {time.perf_counter() - start:.0f} s", flush=True)
            gc.collect()
    torch.set_num_threads(threads)
    left_out = Counter(name for each in found for name in each.left_out)
    close = 100 * sum(each.is_close for each in found) / len(found)
    by_estimate = [sorted(each.estimates.values()) for each in found]
    estimated_close = 100 * sum(second <= CLOSE * first for first, second, *_ in by_estimate) / len(found)
    drawn = [
        Finding(name="problems, in all", value=float(len(found)), unit=""),
        Finding(name="within 4 x of a crossover, by the estimates", value=estimated_close, unit="% of problems"),
        Finding(name="within 4 x of a crossover, by the times", value=close, unit="% of problems"),
        *(
            Finding(name=f"{name} not measured: estimate over {WORTH:g} x the best", value=float(n), unit="problems")
            for name, n in sorted(left_out.items())
        ),
    ]
    for part in parts:
        print(f"{part}: chosen over {AS_GOOD} x the best")
        print("\n".join(told(each, part) for each in found if each.over_best(part) > AS_GOOD) or "  none")
    report({"problems drawn": drawn, **{f"{part} constants": findings(found, part) for part in parts}}, None)
    print(f"in {time.perf_counter() - start:.0f} s")
    if options.json:
        data = {
            "environment": environment() | {"machine": device_name(), "threads": "1 and 2"},
            "limits": {"misses": MISSES, "lost": LOST},
            "parts": {part: dict(zip(("misses", "lost"), figures(found, part))) for part in (*parts, *RULES)},
            "close": {"by the estimates": estimated_close, "by the times": close},
            "problems": [row(each) for each in found],
        }
        text = json.dumps(data, ensure_ascii=False, indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
