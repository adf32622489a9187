"""What does a call cost beside the kernel itself?

The smallest problem there is (B1 H1 S4 D8, float32), so that everything around the kernel shows. Every path is
compared with the bare op that it ends in; paths that take heads last, with that op between the same four permutes.
Limits are in microseconds of the machine on which they were set; by what diffusers' dispatch takes in the same run they
are carried over to this one.
Then growth.py: what imports, plugins, kernels, problems and threads cost.

    nox -s bench -- dispatch [--rounds N] [--calls N] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import attn_core
import growth
import torch
from attn_core import Causal, TensorBias, attention, plan
from timing import COPY, SEED, Contender, Finding, Yardstick, environment, on_one_core, over, report, take_turns
from torch import Tensor

BATCH, HEADS, SEQLEN, DIM = 1, 1, 4, 8
SCALE = DIM**-0.5

#: Microseconds over the bare op that a path may cost where diffusers' dispatch costs so many.
DIFFUSERS_THERE = 3.85
LIMIT, LIMIT_WITH_MORE, LIMIT_PLAN, LIMIT_UNCHECKED = 2.3, 2.8, 1.1, 0.3
#: The part of diffusers' overhead, in the same run, that a call may cost; and what is aimed at.
LIMIT_OF_PEER, AIM_OF_PEER = 0.62, 0.5

_bare = torch._scaled_dot_product_flash_attention_for_cpu

FIRST, LAST, COPIED = "bare op", "bare op + permutes", "bare op + transpose + contiguous"
LAST_CAUSAL, LAST_BIAS, LAST_SLICED = f"{LAST}, causal", f"{LAST}, mask", f"{LAST}, sliced"
#: More distinct problems, one after the other, than any cache of recent ones is likely to hold.
MANY = 16
LAST_SHARED = f"{LAST}, key given twice"
LAST_MANY = f"{LAST}, {MANY} lengths in turn"
ATTENTION, DROP_IN = "attention", "scaled_dot_product_attention (ours)"
DIFFUSERS, TRANSFORMERS = "diffusers dispatch_attention_fn", "transformers ALL_ATTENTION_FUNCTIONS"

LIMITS = {
    ATTENTION: LIMIT,
    DROP_IN: LIMIT,
    "attention, held Causal": LIMIT_WITH_MORE,
    "attention, held TensorBias": LIMIT_WITH_MORE,
    "attention, Causal built per call": LIMIT_WITH_MORE,
    "attention, TensorBias built per call": LIMIT_WITH_MORE,
    "attention, tensor given as it is": LIMIT_WITH_MORE,
    "attention, slices of packed qkv": LIMIT_WITH_MORE,
    f"attention, {MANY} lengths in turn": LIMIT_WITH_MORE,
    "attention, one tensor as key and value": LIMIT_WITH_MORE,
    "plan": LIMIT_PLAN,
    "plan, unchecked": LIMIT_UNCHECKED,
}


def contenders(requires_grad: bool) -> list[Contender]:
    """Every path, after its baseline."""
    torch.manual_seed(SEED)
    query, key, value = (
        torch.randn(BATCH, SEQLEN, HEADS, DIM, requires_grad=requires_grad) for _ in range(3)
    )  # heads last
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_(requires_grad) for x in (query, key, value))
    packed = torch.randn(BATCH, SEQLEN, 3, HEADS, DIM, requires_grad=requires_grad)
    sliced = packed.unbind(2)
    mask = torch.randn(1, 1, SEQLEN, SEQLEN)
    lengths = range(SEQLEN, SEQLEN + MANY)
    many = [
        tuple(torch.randn(BATCH, length, HEADS, DIM, requires_grad=requires_grad) for _ in range(3))
        for length in lengths
    ]
    bare_turn, turn = itertools.cycle(many).__next__, itertools.cycle(many).__next__
    causal, dense = Causal("top-left"), TensorBias(mask)
    planned, unchecked = plan(query, key, value), plan(query, key, value, unchecked=True)
    sdpa, ours = torch.nn.functional.scaled_dot_product_attention, attn_core.scaled_dot_product_attention

    def last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if mask is None and not causal:
            return _bare(query, key, value, scale=SCALE)[0].transpose(1, 2)
        return _bare(query, key, value, 0.0, causal, attn_mask=mask, scale=SCALE)[0].transpose(1, 2)

    return [
        Contender(name=FIRST, call=lambda: _bare(q, k, v, scale=SCALE)[0]),
        Contender(name="F.scaled_dot_product_attention", call=lambda: sdpa(q, k, v), over=FIRST),
        Contender(name=DROP_IN, call=lambda: ours(q, k, v), over=FIRST),
        Contender(name=LAST, call=lambda: last(query, key, value)),
        Contender(name=ATTENTION, call=lambda: attention(query, key, value), over=LAST),
        Contender(name="plan", call=lambda: planned(query, key, value), over=LAST),
        Contender(name="plan, unchecked", call=lambda: unchecked(query, key, value, None), over=LAST),
        Contender(name=LAST_CAUSAL, call=lambda: last(query, key, value, None, True)),
        Contender(name="attention, held Causal", call=lambda: attention(query, key, value, causal), over=LAST_CAUSAL),
        Contender(
            name="attention, Causal built per call",
            call=lambda: attention(query, key, value, Causal("top-left")),
            over=LAST_CAUSAL,
        ),
        Contender(name=LAST_BIAS, call=lambda: last(query, key, value, mask)),
        Contender(name="attention, held TensorBias", call=lambda: attention(query, key, value, dense), over=LAST_BIAS),
        Contender(
            name="attention, TensorBias built per call",
            call=lambda: attention(query, key, value, TensorBias(mask)),
            over=LAST_BIAS,
        ),
        Contender(
            name="attention, tensor given as it is", call=lambda: attention(query, key, value, mask), over=LAST_BIAS
        ),
        Contender(name=LAST_SLICED, call=lambda: last(*sliced)),
        Contender(name="attention, slices of packed qkv", call=lambda: attention(*sliced), over=LAST_SLICED),
        Contender(name=LAST_MANY, call=lambda: last(*bare_turn())),
        Contender(name=f"attention, {MANY} lengths in turn", call=lambda: attention(*turn()), over=LAST_MANY),
        Contender(name=LAST_SHARED, call=lambda: last(query, key, key)),
        Contender(
            name="attention, one tensor as key and value",
            call=lambda: attention(query, key, key),
            over=LAST_SHARED,
        ),
        Contender(name=DIFFUSERS, call=diffusers_call(query, key, value), over=LAST),
        Contender(name=COPIED, call=lambda: _bare(q, k, v, scale=SCALE)[0].transpose(1, 2).contiguous()),
        Contender(name=TRANSFORMERS, call=transformers_call(q, k, v), over=COPIED),
    ]


def diffusers_call(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """diffusers' registry, with its default backend; heads last."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return lambda: dispatch_attention_fn(query, key, value)


def transformers_call(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """transformers' registry, as a model calls it; heads first in, heads last out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = torch.nn.Module()
    module.is_causal = False
    return lambda: ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, dropout=0.0, scaling=SCALE)


def findings(requires_grad: bool, rounds: int, calls: int) -> tuple[list[Finding], Yardstick]:
    """Microseconds over the baselines, two calls as a part of diffusers' overhead; and what limits are scaled by."""
    paths = contenders(requires_grad)
    taken = take_turns(paths, rounds=rounds, calls=calls)
    noise, spread = over(taken, COPY, paths[0].name)
    found = [
        Finding(name="noise: the bare op against itself", value=abs(noise), spread=spread, unit="µs"),
    ]
    overs = {path.name: over(taken, path.name, path.over) for path in paths if path.over is not None}
    diffusers, _ = overs[DIFFUSERS]
    yardstick = Yardstick(name=DIFFUSERS, there=DIFFUSERS_THERE, here=diffusers, unit="µs")
    for path in paths:
        if path.over is None:
            continue
        value, spread = overs[path.name]
        there = LIMITS.get(path.name)
        found.append(
            Finding(
                name=path.name,
                value=value,
                spread=spread,
                unit="µs",
                limit=None if there is None else yardstick.limit(there),
                note=f"over {path.over}" + ("" if there is None else f"; {there:g} there"),
            )
        )
    found += [
        Finding(
            name=f"{name} / diffusers",
            value=overs[name][0] / diffusers,
            unit="×",
            limit=LIMIT_OF_PEER,
            note=f"of {diffusers:.2f} µs; aim {AIM_OF_PEER:g}",
        )
        for name in (ATTENTION, DROP_IN)
    ]
    return found, yardstick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Few calls a round: most rounds then fit into one time slice of a busy machine, and the median is of those.
    parser.add_argument("--rounds", type=int, default=400, help="default 400")
    parser.add_argument("--calls", type=int, default=50, help="calls a round, default 50")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--part", choices=("calls", "growth", "all"), default="all")
    options = parser.parse_args()
    for name, text in environment().items():
        print(f"{name}: {text}")
    sections: dict[str, list[Finding]] = {}
    yardsticks: dict[str, Yardstick] = {}
    if options.part != "calls":
        sections, yardsticks = growth.sections()
    if options.part != "growth":
        on_one_core()
        for title, requires_grad in (("a call, no grad", False), ("a call, with grad", True)):
            sections[title], yardsticks[title] = findings(requires_grad, options.rounds, options.calls)
    report(sections, options.json, yardsticks)


if __name__ == "__main__":
    main()
