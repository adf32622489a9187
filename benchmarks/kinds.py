"""What does each kind of bias cost, over torch's own scaled_dot_product_attention?

At 1x1x1x8, where the kernel's own time is next to nothing, so that what is left is dispatch; and at 4x8x512x64, where
it should not show. A bias is compared with torch's call of the same meaning, in the same turn: no mask, a tensor as
mask, or is_causal. The median is that of the differences within each round; p99 is that of the rounds, so that it has
what a neighbour on the machine took, for torch as for us: it is given over torch's own p99.

What is no tensor is written out at every call by kernels that take nothing else: for ALiBi that is no dispatch, and
has no limit here.

    nox -s bench -- kinds [--rounds N] [--calls N] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ["ATTN_TENSOR_MASK"] = "silent"  # a plain tensor is one of the kinds

import torch
from attn_core import (
    ALiBi,
    AttnBias,
    Causal,
    TensorBias,
    causal_lower_right,
    causal_upper_left,
    scaled_dot_product_attention,
)
from timing import SEED, Contender, Finding, on_one_core, over, report, take_turns
from torch import Tensor

TINY, LARGE = (1, 1, 1, 8), (4, 8, 512, 64)
#: Microseconds over torch, median, that a kind may cost at the tiny size; and percent at the large one.
LIMIT, LIMIT_MATERIALIZES, LIMIT_PERCENT = 10.0, 15.0, 2.0
#: Kinds of one call to torch, of which the same kernel is to be expected: for these the large size has a limit.
SAME_KERNEL = ("None", "TensorBias", "plain tensor", "user's bias, dispatches")

_sdpa = torch.nn.functional.scaled_dot_product_attention
NO_MASK, MASK, CAUSAL = "torch", "torch, mask", "torch, is_causal"


class Materializes(AttnBias):
    """A user's bias that has a tensor made for it beforehand, so that making it is not counted."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor_of_mine = tensor

    def materialize(self, device: Any = None) -> Tensor:
        return self.tensor_of_mine

    def needs_materialization(self) -> bool:
        return True

    @staticmethod
    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, causal: bool, scale: float | None, dropout_p: float
    ) -> Tensor:
        raise NotImplementedError


class Dispatches(Materializes):
    """A user's bias that calls torch by itself."""

    def needs_materialization(self) -> bool:
        return False

    @staticmethod
    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, causal: bool, scale: float | None, dropout_p: float
    ) -> Tensor:
        return _sdpa(query, key, value, attn_bias.tensor_of_mine, dropout_p, causal, scale=scale)


def contenders(shape: tuple[int, int, int, int]) -> list[Contender]:
    """Every kind, after torch's calls."""
    torch.manual_seed(SEED)
    _, heads, seqlen, _ = shape
    q, k, v = torch.randn(3, *shape)
    mask = torch.randn(1, heads, seqlen, seqlen)
    kinds: list[tuple[str, Any, str]] = [
        ("None", None, NO_MASK),
        ("plain tensor", mask, MASK),
        ("TensorBias", TensorBias(mask), MASK),
        ('Causal("top-left")', Causal("top-left"), CAUSAL),
        ("causal_upper_left", causal_upper_left(seqlen, seqlen), CAUSAL),
        ("causal_lower_right", causal_lower_right(seqlen, seqlen), CAUSAL),
        ("ALiBi", ALiBi(heads), MASK),
        ("Causal + ALiBi", Causal() + ALiBi(heads), MASK),
        ("user's bias, materializes", Materializes(mask), MASK),
        ("user's bias, dispatches", Dispatches(mask), MASK),
    ]

    def calling(bias: Any) -> Callable[[], Tensor]:
        return lambda: scaled_dot_product_attention(q, k, v, bias)

    return [
        Contender(name=NO_MASK, call=lambda: _sdpa(q, k, v)),
        Contender(name=MASK, call=lambda: _sdpa(q, k, v, mask)),
        Contender(name=CAUSAL, call=lambda: _sdpa(q, k, v, is_causal=True)),
        *(Contender(name=name, call=calling(bias), over=baseline) for name, bias, baseline in kinds),
    ]


def tiny(rounds: int, calls: int) -> list[Finding]:
    """Microseconds that each kind adds."""
    entered = contenders(TINY)
    taken = take_turns(entered, rounds=rounds, calls=calls)
    findings = []
    for contender in entered:
        if contender.over is None:
            continue
        median, spread = over(taken, contender.name, contender.over)
        p99 = _p99(taken[contender.name]) - _p99(taken[contender.over])
        note = f"over {contender.over}; p99 {p99:+.2f}"
        limit: float | None = LIMIT
        if "ALiBi" in contender.name:
            limit = None
        elif "materializes" in contender.name:  # two calls of the user's methods, and a TensorBias made of the answer
            limit = LIMIT_MATERIALIZES
        findings.append(Finding(name=contender.name, value=median, unit="µs", spread=spread, limit=limit, note=note))
    return findings


def large(rounds: int) -> list[Finding]:
    """Percent that each kind adds, or saves, where the kernel takes the time."""
    entered = contenders(LARGE)
    taken = take_turns(entered, rounds=rounds, calls=1)
    findings = []
    for contender in entered:
        if contender.over is None:
            continue
        ratios = [one / other for one, other in zip(taken[contender.name], taken[contender.over])]
        percent = 100 * (statistics.median(ratios) - 1)
        limit = LIMIT_PERCENT if contender.name in SAME_KERNEL else None
        findings.append(
            Finding(name=contender.name, value=percent, unit="%", limit=limit, note=f"over {contender.over}")
        )
    return findings


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=50, help="per round, at the tiny size")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    on_one_core()
    with torch.no_grad():
        sections = {
            f"{'x'.join(map(str, TINY))}, over torch": tiny(options.rounds, options.calls),
            f"{'x'.join(map(str, LARGE))}, over torch": large(max(10, options.rounds // 10)),
        }
    report(sections, options.json)


if __name__ == "__main__":
    main()
