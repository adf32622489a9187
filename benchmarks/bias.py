"""What does a mask save?

Windows, neighborhoods and packed documents by torch/tiled, against SDPA with the dense boolean mask, which is built
outside the timing. Both take turns in one process, on two threads; the median of each is compared. Each mask has a
process of its own: which pages a process holds from earlier, larger tensors changes what SDPA's take by a third. The
first call is timed with its tables still to be made. Memory is the peak of a process of its own over one that only
holds inputs, output and gradients. Growth is the time of a longer sequence over that of a shorter one, per token.

    nox -s bench -- bias [--part speed|memory|growth] [--only TEXT] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from attn_core import Causal, Mask, Neighborhood, Segments, Window, attention
from attn_core.torch_kernels.tiling.tables import TABLES
from timing import SEED, Finding, environment, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

KERNEL = "torch/tiled"
THREADS = 2
#: A first call, with tables to be made, may take so many times a warm one.
FIRST = 3.0
#: Growth beyond linear that is allowed.
GROWTH = 1.15
#: MB beyond inputs, outputs and gradients.
MEMORY, MEMORY_AIM = 256.0, 64.0
LONG = 131072


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a mask, its sizes, and how many times faster than SDPA it must be (and what is aimed at)."""

    name: str
    mask: Mask
    seqlen: int
    head_dim: int
    forward: float | None
    both: float | None = None
    aims: str = ""
    num_heads: int = 4


def documents() -> list[int]:
    """64 lengths of 8 to 481 tokens."""
    return torch.randint(8, 482, (64,), generator=torch.Generator().manual_seed(SEED)).tolist()


CASES = (
    Case(
        name="Window(256, 256)",
        mask=Window(256, 256),
        seqlen=16384,
        head_dim=64,
        forward=18.0,
        both=14.0,
        aims="30, 26",
    ),
    Case(
        name="Neighborhood 64x64, k 13",
        mask=Neighborhood((64, 64), kernel_size=13),
        seqlen=4096,
        head_dim=32,
        forward=6.0,
        both=4.5,
        aims="10, 8",
    ),
    Case(
        name="Neighborhood 56x56, k 7",
        mask=Neighborhood((56, 56), kernel_size=7),
        seqlen=3136,
        head_dim=32,
        forward=8.0,
        both=7.0,
        aims="14, 11",
    ),
    Case(
        name="Segments, 64 documents, causal",
        mask=Segments(documents(), within=Causal()),
        seqlen=sum(documents()),
        head_dim=64,
        forward=30.0,
        aims="50",
    ),
)


def operands(seqlen: int, num_heads: int, head_dim: int) -> list[Tensor]:
    """Query, key, value and a gradient to the output, heads-last."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(1, seqlen, num_heads, head_dim, generator=generator) for _ in range(4)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(one: Callable[[], object], other: Callable[[], object], rounds: int, times: int) -> tuple[float, float]:
    """Median seconds of each: every round has one call of `one`, and `times` of `other`."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        taken[0].append(seconds(one))
        taken[1].extend(seconds(other) for _ in range(times))
    return statistics.median(taken[0]), statistics.median(taken[1])


def speed(case: Case, rounds: int) -> list[Finding]:
    """Ratios to SDPA with a dense mask, and of the first call to a warm one; forward, and forward + backward."""
    query, key, value, grad = operands(case.seqlen, case.num_heads, case.head_dim)
    dense = case.mask.bind(case.seqlen, case.seqlen).materialize()

    def tiled() -> Tensor:
        return attention(query, key, value, case.mask, kernel=KERNEL)

    def stock() -> Tensor:
        operands = (x.transpose(1, 2) for x in (query, key, value))
        return sdpa(*operands, attn_mask=dense).transpose(1, 2)

    found: list[Finding] = []
    for what, least in (("forward", case.forward), ("forward + backward", case.both)):
        if what != "forward":
            for x in (query, key, value):
                x.requires_grad_()

        def whole(call: Callable[[], Tensor], backward: bool = what != "forward") -> Callable[[], object]:
            if not backward:
                return call
            return lambda: torch.autograd.grad(call(), (query, key, value), grad)

        whole(tiled)()  # the choice, the allocator: what a process does once, whatever the mask
        TABLES.clear()
        first = seconds(whole(tiled))
        dear, cheap = in_turns(whole(stock), whole(tiled), rounds, 5)
        note = f"S {case.seqlen}, H {case.num_heads}, D {case.head_dim}; {1e3 * cheap:.1f} ms; aims {case.aims}"
        # Limits are "at most": so it is the part of SDPA's time that is reported, and the ratio beside it.
        found += [
            Finding(
                name=f"{case.name}, {what}",
                value=100.0 * cheap / dear,
                unit="% of SDPA",
                limit=None if least is None else 100.0 / least,
                note=f"{dear / cheap:.1f} times as fast"
                + ("" if least is None else f", must be {least:g}")
                + f"; {note}",
            ),
            Finding(name=f"{case.name}, {what}, first call", value=first / cheap, unit="× warm", limit=FIRST),
        ]
    return found


def in_process(case: Case, rounds: int) -> list[Finding]:
    """`speed` of a mask, in a process that has not run any other."""
    command = [sys.executable, __file__, "--speed", case.name, "--rounds", str(rounds)]
    print(f"{case.name} …", file=sys.stderr, flush=True)
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Finding(**finding) for finding in json.loads(printed)]


#: What is held at the end of each measured process; the second process only makes these.
SIZES = {"forward": 4, "forward + backward": 8}


def peak(what: str, only_hold: bool) -> None:
    """Prints the peak of this process in MB: of an attention of LONG tokens, or of its operands and results alone."""
    torch.set_num_threads(THREADS)
    query, key, value, grad = operands(LONG, 4, 64)
    backward = what != "forward"
    if only_hold:
        held = [query, key, value, grad] + [torch.ones_like(query) for _ in range(4 if backward else 1)]
        small = operands(1024, 4, 64)  # what torch itself takes once it has computed something
        attention(*(x.requires_grad_(backward) for x in small[:3]), Window(256, 256), kernel=KERNEL).sum()
    else:
        inputs = [x.requires_grad_(backward) for x in (query, key, value)]
        out = attention(*inputs, Window(256, 256), kernel=KERNEL)
        held = [*inputs, out, grad, *(torch.autograd.grad(out, inputs, grad) if backward else ())]
    assert len(held) in (5, 8)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def memory() -> list[Finding]:
    """MB at LONG tokens beyond what holds the operands, the output and the gradients."""
    found = []
    for what in SIZES:
        peaks = [
            float(
                subprocess.run(
                    [sys.executable, __file__, "--peak", what, *(["--only-hold"] if only_hold else [])],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for only_hold in (False, True)
        ]
        found.append(
            Finding(
                name=f"Window(256, 256), S {LONG}, {what}",
                value=peaks[0] - peaks[1],
                unit="MB",
                limit=MEMORY,
                note=f"beyond inputs, outputs, gradients ({peaks[1]:.0f} MB); a dense mask: 17180; aim {MEMORY_AIM:g}",
            )
        )
    return found


def keep_memory() -> None:
    """Makes glibc keep what is freed: else every call pays for the pages of a long output, whoever computes it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: at most so much is given back


def packed(lengths: list[int]) -> tuple[Segments, int]:
    """Causal documents, and their tokens."""
    return Segments(lengths, within=Causal()), sum(lengths)


def growth(rounds: int) -> list[Finding]:
    """Time per token of the longer sequence, over that of the shorter one; warm, memory too."""
    keep_memory()
    window, even, uneven = Window(256, 256), [256] * 4096, [240 + n * 7 % 17 for n in range(4096)]
    cases = [
        ("Window(256, 256), S 16384 to 131072", window, 16384, window, LONG),
        ("Segments, 64 to 4096 documents of 256 tokens", *packed(even[:64]), *packed(even)),
        ("Segments, 64 to 4096 documents of 240 to 256 tokens", *packed(uneven[:64]), *packed(uneven)),
    ]
    found = []
    for name, few, short, many, long in cases:
        calls = []
        for mask, seqlen in ((few, short), (many, long)):
            query, key, value = operands(seqlen, 2, 64)[:3]
            calls.append(lambda q=query, k=key, v=value, mask=mask: attention(q, k, v, mask, kernel=KERNEL))
            calls[-1]()
        longer, shorter = in_turns(calls[1], calls[0], max(rounds, 5), 5)
        found.append(
            Finding(
                name=f"{name}, forward",
                value=longer / shorter / (long / short),
                unit="× linear",
                limit=GROWTH,
                note=f"H 2, D 64; {1e3 * shorter:.2f} to {1e3 * longer:.1f} ms",
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of SDPA per figure, default 5; five times ours")
    parser.add_argument("--part", choices=("speed", "memory", "growth", "all"), default="all")
    parser.add_argument("--only", default="", help="of the speeds, those of masks whose name holds this text")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", choices=tuple(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--speed", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--only-hold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        peak(options.peak, options.only_hold)
        return
    if options.speed is not None:
        torch.set_num_threads(THREADS)
        [case] = [case for case in CASES if case.name == options.speed]
        print(json.dumps([asdict(finding) for finding in speed(case, options.rounds)]))
        return
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"--only: no mask has {options.only!r} in its name: {', '.join(case.name for case in CASES)}")
    torch.set_num_threads(THREADS)
    for name, text in environment().items():
        print(f"{name}: {text}")
    print(f"threads: {torch.get_num_threads()}")
    sections: dict[str, list[Finding]] = {}
    if options.part in ("memory", "all"):
        sections["peak memory"] = memory()
    if options.part in ("growth", "all"):
        sections["growth"] = growth(options.rounds)
    if options.part in ("speed", "all"):
        sections["speed, against SDPA with a dense boolean mask"] = [
            finding for case in cases for finding in in_process(case, options.rounds)
        ]
    report(sections, options.json)


if __name__ == "__main__":
    main()
