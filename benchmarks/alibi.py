"""ALiBi: what does it save not to write the bias out?

Causal ALiBi on the CPU, float32, forward: (a) `attention(..., Causal() + ALiBi(H))`, by whatever is chosen; (b) the
same written out once as TensorBias; (c) torch's scaled_dot_product_attention with a mask made by hand, once. (b) and
(c) have their tensor made outside the timing; (d) makes it within, as a model does that cannot keep one per length.
Lengths from 512 to 8192. Times take turns in one process and are given as ratios to (c); memory is the peak of a
process of its own, over what operands and result take, the tensor of (b) and (c) included.

    nox -s bench -- alibi [--lengths N ...] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from attn_core import ALiBi, Causal, TensorBias, attention, explain
from timing import SEED, Contender, Finding, report, take_turns
from torch import Tensor

HEADS, DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
BY_ATTN, WRITTEN_OUT, BY_HAND, MADE_ANEW = (
    "attention, ALiBi",
    "attention, TensorBias",
    "torch, mask",
    "torch, mask made",
)


def operands(seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads last."""
    torch.manual_seed(SEED)
    query, key, value = torch.randn(3, 1, seqlen, HEADS, DIM)
    return query, key, value


def mask_by_hand(seqlen: int) -> Tensor:
    """`[1, HEADS, seqlen, seqlen]`, as models write it."""
    places = torch.arange(seqlen)
    distance = places[:, None] - places
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))[None]


def ways(seqlen: int) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Name -> what makes the call, its tensor among it."""
    query, key, value = operands(seqlen)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def by_attn() -> Callable[[], Tensor]:
        bias = Causal() + ALiBi(HEADS)
        return lambda: attention(query, key, value, bias)

    def written_out() -> Callable[[], Tensor]:
        bias = TensorBias((Causal() + ALiBi(HEADS)).bind(seqlen, seqlen).materialize())
        return lambda: attention(query, key, value, bias)

    def by_hand() -> Callable[[], Tensor]:
        mask = mask_by_hand(seqlen)
        return lambda: sdpa(q, k, v, mask).transpose(1, 2)

    def made_anew() -> Callable[[], Tensor]:
        return lambda: sdpa(q, k, v, mask_by_hand(seqlen)).transpose(1, 2)

    return {BY_HAND: by_hand, BY_ATTN: by_attn, WRITTEN_OUT: written_out, MADE_ANEW: made_anew}


def speed(lengths: list[int], rounds: int) -> list[Finding]:
    """Time of each way over that of torch with a mask that is there already."""
    findings = []
    for seqlen in lengths:
        calls = {name: make() for name, make in ways(seqlen).items()}
        expected = calls[BY_HAND]()
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-5, msg=name)
        entered = [
            Contender(name=name, call=call, over=None if name == BY_HAND else BY_HAND) for name, call in calls.items()
        ]
        taken = take_turns(entered, rounds=rounds, calls=1)
        chosen = explain(*operands(seqlen), Causal() + ALiBi(HEADS)).chosen
        for name in (BY_ATTN, WRITTEN_OUT, MADE_ANEW):
            ratio = statistics.median(one / other for one, other in zip(taken[name], taken[BY_HAND]))
            note = f"by {chosen}" if name == BY_ATTN else ""
            findings.append(Finding(name=f"{seqlen}: {name}", value=ratio, unit="×", note=note))
    return findings


def memory(lengths: list[int]) -> list[Finding]:
    """MiB at the peak, over the operands and the result."""
    findings = []
    for seqlen in lengths:
        base = peak(seqlen, None)
        for name in (BY_ATTN, WRITTEN_OUT, BY_HAND):
            findings.append(Finding(name=f"{seqlen}: {name}", value=peak(seqlen, name) - base, unit="MiB"))
    return findings


def peak(seqlen: int, name: str | None) -> float:
    """Peak memory, in MiB, of a process that makes one call; None: that only has operands and a result."""
    command = [sys.executable, __file__, "--child", json.dumps([seqlen, name])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def child(seqlen: int, name: str | None) -> float:
    """The same, of this process."""
    for warm in ways(64).values():
        warm()()
    made = ways(seqlen)
    with torch.no_grad():
        out = torch.ones(1, seqlen, HEADS, DIM) if name is None else made[name]()()
    assert out.shape == (1, seqlen, HEADS, DIM)
    return highest()


def highest() -> float:
    """The most memory that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before it became this process
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if options.child is not None:
        print(child(*json.loads(options.child)))
        return
    with torch.no_grad():
        sections = {
            f"time over torch with a mask at hand, H {HEADS}, D {DIM}, causal": speed(options.lengths, options.rounds),
            "peak memory over operands and result": memory(options.lengths),
        }
    report(sections, options.json)


if __name__ == "__main__":
    main()
