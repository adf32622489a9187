"""ALiBi: what does it save not to write the bias out?

Causal ALiBi on the CPU, forward, and forward + backward: (a) `attention(..., Causal() + ALiBi(H))`, by whatever is
chosen; (b) the same written out once as TensorBias, in the operands' dtype; (c) torch's scaled_dot_product_attention
with a mask made by hand, once. (b) and (c) have their tensor made outside the timing; (d) makes it within, as a model
does that cannot keep one per length. Times take turns in a process of their own for each point, on two threads, and are
given as ratios to (c). Memory is the peak of a process of its own over one that holds operands, output and gradients
alone; the tensor of (b) and (c) is part of it.

A point is a dtype, heads and a length. By default the lengths go from 512 to 8,192 at bfloat16 and 8 heads, and dtypes
and heads change at 2,048; where one of the options names any, all that they name are combined. What would not fit into
memory is left out, and said.

    nox -s bench -- alibi [--lengths N ...] [--heads N ...] [--dtypes NAME ...] [--what forward|both|all]
                          [--part speed|memory|all] [--rounds N] [--seconds S] [--most GB] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path

import torch
from attn_core import ALiBi, Causal, TensorBias, attention, explain
from timing import SEED, Finding, environment, report
from torch import Tensor

DIM, THREADS = 64, 2
#: Where nothing else is said: one dtype, number of heads and length, about which each is varied.
DTYPE, HEADS, SEQLEN = "bfloat16", 8, 2048
DTYPES, MANY_HEADS = ("float32", "float16", "bfloat16"), (8, 16, 32)
LENGTHS = (512, 1024, 2048, 4096, 8192)  # with 16,384, whose calls take a minute, by --lengths
FORWARD, BOTH = "forward", "forward + backward"
BY_ATTN, WRITTEN_OUT, BY_HAND, MADE_ANEW = (
    "attention, ALiBi",
    "attention, TensorBias",
    "torch, mask",
    "torch, mask made",
)
#: Rounds, however long they take: of fewer, a median says nothing.
LEAST = 3
#: How far results may lie apart that are rounded alike: some steps of the dtype at 1.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Point:
    """What is asked, of every way alike."""

    dtype: str
    num_heads: int
    seqlen: int
    what: str = FORWARD

    def __str__(self) -> str:
        return f"{self.dtype}, H {self.num_heads}, S {self.seqlen}, {self.what}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def pairs(self) -> int:
        """Numbers in the mask."""
        return self.num_heads * self.seqlen**2

    def needs(self, name: str) -> tuple[int, str]:
        """Bytes that a way holds at its worst, beside operands and results, and how they come about."""
        size = self.torch_dtype.itemsize
        if name == BY_ATTN:
            return 0, "no tensor of all pairs"
        if name == BY_HAND:  # made a head at a time
            made, text = 3 * 4 * self.seqlen**2, f"3 * 4 * {self.seqlen}^2"
        else:  # in float32, with what it is computed from
            made, text = 2 * 4 * self.pairs, f"2 * 4 * {self.num_heads} * {self.seqlen}^2"
        return self.pairs * size + made, f"{size} * {self.num_heads} * {self.seqlen}^2 + {text} bytes"


def points(
    dtypes: Sequence[str] | None, heads: Sequence[int] | None, lengths: Sequence[int] | None, what: Sequence[str]
) -> list[Point]:
    """Those that are named, combined; where none is, each of the three varied by itself."""
    if dtypes or heads or lengths:
        combined = product(dtypes or (DTYPE,), heads or (HEADS,), lengths or LENGTHS)
    else:
        varied = [(DTYPE, HEADS, seqlen) for seqlen in LENGTHS]
        varied += [(dtype, HEADS, SEQLEN) for dtype in DTYPES if dtype != DTYPE]
        varied += [(DTYPE, many, SEQLEN) for many in MANY_HEADS if many != HEADS]
        combined = iter(varied)
    return [Point(*chosen, each) for chosen in combined for each in what]


def operands(point: Point) -> list[Tensor]:
    """Query, key and value, heads last, and a gradient to the output."""
    torch.manual_seed(SEED)
    *inputs, grad = torch.randn(4, 1, point.seqlen, point.num_heads, DIM).to(point.torch_dtype)
    return [*(x.requires_grad_(point.what == BOTH) for x in inputs), grad]


def mask_by_hand(point: Point) -> Tensor:
    """`[1, num_heads, seqlen, seqlen]`, as models write it, but with no other tensor of that size beside it."""
    places = torch.arange(point.seqlen)
    distance = places[:, None] - places
    mask = torch.empty(1, point.num_heads, point.seqlen, point.seqlen, dtype=point.torch_dtype)
    for head in range(point.num_heads):
        slope = 2.0 ** (-8.0 * (head + 1) / point.num_heads)
        mask[0, head] = (-slope * distance).masked_fill_(distance < 0, float("-inf"))
    return mask


def ways(point: Point, inputs: Sequence[Tensor]) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Name -> what makes the call, its tensor among it. A call gives the output; with `BOTH` it has made gradients."""
    query, key, value, grad = inputs
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    bias = Causal() + ALiBi(point.num_heads)

    def whole(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if point.what == FORWARD:
            return call

        def both() -> Tensor:
            out = call()
            torch.autograd.grad(out, (query, key, value), grad)
            return out.detach()

        return both

    def written_out() -> Callable[[], Tensor]:
        dense = TensorBias(bias.bind(point.seqlen, point.seqlen).materialize().to(point.torch_dtype))
        return whole(lambda: attention(query, key, value, dense))

    def by_hand() -> Callable[[], Tensor]:
        mask = mask_by_hand(point)
        return whole(lambda: sdpa(q, k, v, mask).transpose(1, 2))

    return {
        BY_HAND: by_hand,
        BY_ATTN: lambda: whole(lambda: attention(query, key, value, bias)),
        WRITTEN_OUT: written_out,
        MADE_ANEW: lambda: whole(lambda: sdpa(q, k, v, mask_by_hand(point)).transpose(1, 2)),
    }


def fitting(point: Point, names: Sequence[str], most: float) -> tuple[list[str], list[str]]:
    """The ways that stay below `most` bytes, alone, and a line for each that does not."""
    fit, left_out = [], []
    for name in names:
        needed, text = point.needs(name)
        if needed <= most:
            fit.append(name)
        else:
            left_out.append(f"{point}: {name}: left out, {text} = {needed / 1e9:.1f} GB, above {most / 1e9:.1f} GB")
    return fit, left_out


def speed(point: Point, rounds: int, seconds: float, most: float) -> list[Finding]:
    """Time of each way over that of torch with a mask that is there already; for all, some `seconds`."""
    held = point.pairs * point.torch_dtype.itemsize  # by each of those that keep a tensor
    names = [name for name in (BY_HAND, BY_ATTN, WRITTEN_OUT, MADE_ANEW) if point.needs(name)[0] + held <= most]
    inputs = operands(point)
    calls = {name: make() for name, make in ways(point, inputs).items() if name in names}
    outs: dict[str, Tensor] = {}
    for name, call in calls.items():
        timed(name, call, outs)  # what a process does once
    tolerance = TOLERANCE[point.dtype]
    for name, out in outs.items():
        torch.testing.assert_close(
            out, outs[BY_HAND], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    once = sum([timed(name, call, outs) for name, call in calls.items()])
    rounds = max(LEAST, min(rounds, int(seconds / once)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    chance, order = random.Random(SEED), list(calls)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            taken[name].append(timed(name, calls[name], outs))
    chosen = explain(*inputs[:3], Causal() + ALiBi(point.num_heads)).chosen
    findings = []
    for name in names[1:]:
        ratio = statistics.median(one / other for one, other in zip(taken[name], taken[BY_HAND]))
        note = f"by {chosen}; " if name == BY_ATTN else ""
        findings.append(
            Finding(name=f"{point}: {name}", value=ratio, unit="× torch, mask", note=f"{note}{rounds} rounds")
        )
    return findings


def timed(name: str, call: Callable[[], Tensor], outs: dict[str, Tensor]) -> float:
    """Seconds of a call, whose output is kept."""
    start = time.perf_counter()
    outs[name] = call()
    return time.perf_counter() - start


def peak(point: Point, name: str | None) -> float:
    """The most memory that this process has had, in MiB, after one call; None: with what every call holds alone."""
    small = Point(point.dtype, point.num_heads, 64, point.what)
    for warm in ways(small, operands(small)).values():
        warm()()
    inputs = operands(point)
    if name is None:
        results = [torch.ones_like(inputs[0]) for _ in range(4 if point.what == BOTH else 1)]
        assert len(results) in (1, 4)
    else:
        ways(point, inputs)[name]()()
    return highest()


def highest() -> float:
    """The most memory that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before it became this process
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory(point: Point, most: float) -> tuple[list[Finding], list[str]]:
    """MiB at the peak, over operands, output and gradients; and what was left out."""
    fit, left_out = fitting(point, (BY_ATTN, WRITTEN_OUT, BY_HAND), most)
    base = in_process("peak", point, None)
    findings = [
        Finding(name=f"{point}: {name}", value=in_process("peak", point, name) - base, unit="MiB") for name in fit
    ]
    return findings, left_out


def speeds(point: Point, rounds: int, seconds: float, most: float) -> tuple[list[Finding], list[str]]:
    """`speed` in a process of its own; and what was left out. Nothing without (c), which is what all is compared to."""
    held = point.pairs * point.torch_dtype.itemsize
    fit, left_out = fitting(point, (BY_HAND, BY_ATTN, WRITTEN_OUT, MADE_ANEW), most - held)
    if BY_HAND not in fit:
        return [], [line for line in left_out if BY_HAND in line]
    return [Finding(**each) for each in in_process("speed", point, rounds, seconds, most)], left_out


def in_process(task: str, point: Point, *rest: object) -> object:
    """What `child` prints in a process that has run nothing else."""
    command = [sys.executable, __file__, "--child", json.dumps([task, astuple(point), *rest])]
    print(f"{task}: {point}{f', {rest[0]}' if task == 'peak' else ''} …", file=sys.stderr, flush=True)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(task: str, point: Sequence[object], *rest: object) -> object:
    """One task in this process."""
    asked = Point(*point)  # type: ignore[arg-type]
    if task == "peak":
        return peak(asked, *rest)  # type: ignore[arg-type]
    return [asdict(finding) for finding in speed(asked, *rest)]  # type: ignore[arg-type]


def free_memory() -> float:
    """Bytes that nobody uses now; what cannot be found out is taken for 8 GB."""
    known = Path("/proc/meminfo")
    if known.exists():
        (line,) = (line for line in known.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 2**10
    return 8e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default {' '.join(map(str, LENGTHS))}")
    parser.add_argument("--heads", type=int, nargs="+", help=f"default {HEADS}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help=f"default {DTYPE}")
    parser.add_argument("--what", choices=("forward", "both", "all"), default="all", help="both: forward and backward")
    parser.add_argument("--part", choices=("speed", "memory", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=9, help="at most so many of each call, default 9")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help=f"and so long for a point but for {LEAST} rounds, default 10 s"
    )
    parser.add_argument("--most", type=float, metavar="GB", help="memory of one process; default half of what is free")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    if options.child is not None:
        print(json.dumps(child(*json.loads(options.child))))
        return
    for name in ("lengths", "heads"):
        if any(number < 1 for number in getattr(options, name) or ()):
            parser.error(f"--{name}: takes numbers from 1 on, got {' '.join(map(str, getattr(options, name)))}")
    if any(heads & (heads - 1) for heads in options.heads or ()):
        parser.error(f"--heads: takes powers of 2, as the mask by hand does, got {' '.join(map(str, options.heads))}")
    what = {"forward": (FORWARD,), "both": (BOTH,), "all": (FORWARD, BOTH)}[options.what]
    asked = points(options.dtypes, options.heads, options.lengths, what)
    most = free_memory() / 2 if options.most is None else options.most * 1e9
    for name, text in environment().items():
        print(f"{name}: {text}")
    print(f"threads: {torch.get_num_threads()}; memory of one process at most {most / 1e9:.1f} GB")
    sections: dict[str, list[Finding]] = {}
    left_out: list[str] = []
    for part, title in (("speed", f"time, causal, D {DIM}"), ("memory", "peak memory over operands and results")):
        if options.part not in (part, "all"):
            continue
        sections[title] = []
        for point in asked:
            if part == "speed":
                found, lines = speeds(point, options.rounds, options.seconds, most)
            else:
                found, lines = memory(point, most)
            sections[title] += found
            left_out += [f"{part}: {line}" for line in lines]
    report(sections, options.json)
    for line in left_out:
        print(line)


if __name__ == "__main__":
    main()
