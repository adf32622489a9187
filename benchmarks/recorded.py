"""What does the kernel that is chosen take, over torch's own call, on the problems that real models ask?

The problems are those of attn_core.testing.recorded: of timm, transformers and diffusers, with where each came from.
Each is asked of `attention`, which chooses, and of torch's scaled_dot_product_attention as a model would call it: with
is_causal where that says it, else with a dense mask that is made beforehand, since models make theirs once. The two
take turns, and 1.00 is torch's time. A training problem is timed forward and backward.

Before that, results are compared: a problem on which they differ is named, and the status is 1. A softcap cannot be
asked of torch's call; those problems, and those too large for this machine, are counted and left out.

    nox -s bench -- recorded [--number N] [--library NAME] [--logits N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from attn_core import Causal, Problem, TensorBias, attention, explain
from attn_core.testing.problems import Inputs, build
from attn_core.testing.recorded import Recorded, evenly, recorded_problems
from timing import SEED, Contender, environment, on_one_core, take_turns
from torch import Tensor

#: Seconds that a turn of one contender lasts, about: calls are repeated until then.
TURN = 0.01
OURS, TORCH = "attn", "torch"
_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Row:
    """One problem, timed."""

    recorded: Recorded
    kernel: str
    ratio: float  #: attn's time over torch's, median of the rounds
    low: float  #: quartiles of it
    high: float
    agrees: bool

    def as_data(self) -> dict[str, Any]:
        told = {name: getattr(self.recorded, name) for name in ("origin", "library", "kind", "form")}
        figures = {name: getattr(self, name) for name in ("kernel", "ratio", "low", "high", "agrees")}
        return told | {"problem": str(self.recorded.problem)} | figures


def logits(problem: Problem) -> int:
    return problem.batch * problem.num_heads * problem.seqlen_q * problem.seqlen_kv


def torch_call(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """Torch's own call of the same meaning, heads first as torch wants it."""
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    options = {"scale": problem.scale, "enable_gqa": problem.num_heads != problem.num_kv_heads}
    bias = inputs.bias
    if isinstance(bias, Causal) and bias.corner == "top-left":
        return lambda: _sdpa(query, key, value, is_causal=True, **options)
    if isinstance(bias, TensorBias):
        mask: Tensor | None = bias.tensor
    elif bias is None:
        mask = None
    else:
        mask = bias.materialize()
        if mask.dtype is not torch.bool:
            mask = mask.to(problem.dtype)
    return lambda: _sdpa(query, key, value, mask, **options)


def our_call(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: attention(inputs.query, inputs.key, inputs.value, inputs.bias, **inputs.options)  # type: ignore[return-value]


def with_backward(call: Callable[[], Tensor], inputs: Inputs, heads_first: bool) -> Callable[[], Sequence[Tensor]]:
    """Forward and backward, to all that wants a gradient."""
    wanted = [inputs.query, inputs.key, inputs.value]
    if inputs.bias is not None:
        wanted += [tensor for tensor in inputs.bias.held().values() if tensor.requires_grad]
    fed = inputs.grad_out.transpose(1, 2) if heads_first else inputs.grad_out
    return lambda: torch.autograd.grad(call(), wanted, fed)


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two kernels may differ so, in rows that see a key at all: torch's call gives others what it likes."""
    ours, theirs = ours.double(), theirs.transpose(1, 2).double()
    seen = (ours != 0).any(-1, keepdim=True) & theirs.isfinite().all(-1, keepdim=True)
    off = ((ours - theirs) * seen).nan_to_num().norm() / (theirs * seen).nan_to_num().norm().clamp_min(1e-30)
    return bool(off < 0.02)


def timed(recorded: Recorded, rounds: int) -> Row:
    problem = recorded.problem
    inputs = build(problem, seed=SEED)
    ours, theirs = our_call(inputs), torch_call(problem, inputs)
    kernel = explain(inputs.query, inputs.key, inputs.value, inputs.bias, **inputs.options).chosen
    with torch.no_grad():
        agrees = alike(ours(), theirs())
    calls: tuple[Callable[[], object], Callable[[], object]] = (ours, theirs)
    if problem.requires_grad:
        calls = with_backward(ours, inputs, False), with_backward(theirs, inputs, True)
    contenders = [Contender(name=TORCH, call=calls[1]), Contender(name=OURS, call=calls[0], over=TORCH)]
    with torch.set_grad_enabled(problem.requires_grad):
        once = statistics.median(take_turns(contenders[:1], rounds=2, calls=1)[TORCH]) / 1e6
        taken = take_turns(contenders, rounds=rounds, calls=max(1, round(TURN / once)))
    low, middle, high = statistics.quantiles([one / other for one, other in zip(taken[OURS], taken[TORCH])], n=4)
    return Row(recorded=recorded, kernel=kernel, ratio=middle, low=low, high=high, agrees=agrees)


def show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    each = Table(title="time over torch's scaled_dot_product_attention", title_justify="left")
    for column in ("from", "problem", "kernel", "ratio", "quartiles", ""):
        each.add_column(column, justify="right" if column in ("ratio", "quartiles") else "left")
    for row in rows:
        of = row.recorded
        quartiles = f"{row.low:.2f} to {row.high:.2f}"
        verdict = "" if row.agrees else "DIFFERS"
        each.add_row(of.origin, str(of.problem), row.kernel, f"{row.ratio:.2f}", quartiles, verdict)
    console.print(each)
    kinds = Table(title="by kind of bias", title_justify="left")
    for column in ("", "problems", "median ratio", "smallest", "largest"):
        kinds.add_column(column, justify="right" if column else "left")
    for kind in [*dict.fromkeys(row.recorded.kind for row in rows), "all"]:
        ratios = [row.ratio for row in rows if kind in (row.recorded.kind, "all")]
        figures = statistics.median(ratios), min(ratios), max(ratios)
        kinds.add_row(kind, str(len(ratios)), *(f"{figure:.2f}" for figure in figures))
    console.print(kinds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--number", type=int, metavar="N", help="at most N, from each library and kind; default: all")
    parser.add_argument("--library", action="append", metavar="NAME", help="timm, transformers or diffusers only")
    parser.add_argument(
        "--logits", type=int, default=1 << 23, metavar="N", help="largest problem; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures, too")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need 2 at least")
    known = {each.library for each in recorded_problems()}
    if unknown := set(options.library or ()) - known:
        parser.error(f"--library: no problems of {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    on_one_core()
    told = environment()
    every = [each for each in recorded_problems() if each.library in (options.library or known)]
    capped = [each for each in every if each.problem.softcap is not None]
    large = [each for each in every if each not in capped and logits(each.problem) > options.logits]
    asked = [each for each in every if each not in capped and each not in large]
    asked = evenly(asked, options.number if options.number is not None else len(asked))
    left_out = f"{len(capped)} with softcap, {len(large)} of more than {options.logits} logits"
    print(f"{len(asked)} problems; left out: {left_out}")
    rows = []
    for number, each in enumerate(asked, 1):
        each = replace(each, problem=replace(each.problem, dropout_p=0.0))
        print(f"{number}/{len(asked)} {each.origin}", file=sys.stderr, flush=True)
        rows.append(timed(each, options.rounds))
    if not rows:
        parser.error("no problem is left")
    show(rows)
    if options.json:
        data = {"environment": told, "rows": [row.as_data() for row in rows]}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    different = [row for row in rows if not row.agrees]
    print(f"{len(different)} differ from torch's result" if different else "all agree with torch's results")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
