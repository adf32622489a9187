"""One way to compute neighborhood attention, in a process of its own that waits for its turn.

    python contender.py NAME

It reads what to do from its standard input, a line of JSON each, and answers with a line each, until there is no more:

- {"case": …, "what": …, "file": PATH} writes the results to that file, as a list of tensors;
- {"case": …, "what": …, "calls": N} answers with the seconds of N calls, after one that is not timed.

A case is {"extents", "kernel_size", "num_heads", "head_dim", "seed"}; what is "forward" or "forward + backward".

Lies apart from the benchmark, which has the name of the library that is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

THREADS = 2
FUSED, UNFUSED, SDPA = "attn, fused", "attn, unfused", "SDPA, dense mask"
OLD, NEW = "NATTEN 0.17.5", "NATTEN 0.21.7 flex-fna"
FORWARD, BOTH = "forward", "forward + backward"


class Case(NamedTuple):
    """One problem: batch 1, float32."""

    extents: list[int]
    kernel_size: list[int]
    num_heads: int
    head_dim: int
    seed: int


class Way(NamedTuple):
    """`call` computes an output of query, key and value; `inward` makes its operands of ours, `outward` the way back.

    Ours are [1, *extents, num_heads, head_dim]. What `inward` does is not timed: a model keeps its own layout.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    inward: Callable[[Tensor], Tensor]
    outward: Callable[[Tensor], Tensor]


def operands(case: Case) -> list[Tensor]:
    """Query, key, value and a gradient to the output."""
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randn(1, *case.extents, case.num_heads, case.head_dim, generator=generator) for _ in range(4)]


def as_it_is(x: Tensor) -> Tensor:
    return x


def heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1).contiguous()


def heads_last(x: Tensor) -> Tensor:
    return x.movedim(1, -2)


def fused(case: Case) -> Way:
    import attn_natten

    op = getattr(attn_natten, f"na{len(case.extents)}d")
    return Way(partial(op, kernel_size=tuple(case.kernel_size)), as_it_is, as_it_is)


def unfused(case: Case) -> Way:
    import attn_natten.functional

    return by_products(case, attn_natten.functional)


def by_products(case: Case, functional: Any) -> Way:
    """qk, softmax and av, of a module that has these ops; they do not scale."""
    rank, scale = len(case.extents), case.head_dim**-0.5
    qk, av = getattr(functional, f"na{rank}d_qk"), getattr(functional, f"na{rank}d_av")
    where: dict[str, Any] = {"kernel_size": tuple(case.kernel_size), "dilation": 1}
    return Way(lambda q, k, v: av(qk(q * scale, k, **where).softmax(-1), v, **where), heads_first, heads_last)


def old(case: Case) -> Way:
    sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / "attn-natten" / "tests"))
    from natten_0_17 import natten_0_17

    return by_products(case, natten_0_17())


def new(case: Case) -> Way:
    import natten

    op = getattr(natten, f"na{len(case.extents)}d")
    return Way(partial(op, kernel_size=tuple(case.kernel_size), backend="flex-fna"), as_it_is, as_it_is)


def sdpa(case: Case) -> Way:
    from attn_core import Neighborhood

    tokens = prod(case.extents)
    mask = Neighborhood(case.extents, kernel_size=case.kernel_size).bind(tokens, tokens).materialize()
    call = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask)
    return Way(
        call,
        lambda x: x.flatten(1, -3).transpose(1, 2),
        lambda x: x.transpose(1, 2).unflatten(1, case.extents),
    )


WAYS: dict[str, Callable[[Case], Way]] = {FUSED: fused, UNFUSED: unfused, OLD: old, NEW: new, SDPA: sdpa}


def whole(way: Way, case: Case, what: str) -> Callable[[], list[Tensor]]:
    """What is timed: gives the output, and with the backward the gradients to query, key and value, in our layout."""
    *inputs, grad = (way.inward(x) for x in operands(case))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [way.outward(way.call(*inputs))]

    def both() -> list[Tensor]:
        out = way.call(*inputs)
        return [way.outward(x.detach()) for x in (out, *torch.autograd.grad(out, inputs, grad))]

    if what == FORWARD:
        return forward
    for x in inputs:
        x.requires_grad_()
    return both


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def serve(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not taken for an answer
    torch.set_num_threads(THREADS)
    ready: tuple[Any, Callable[[], list[Tensor]]] | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        key = (asked["case"], asked["what"])
        if ready is None or ready[0] != key:
            ready = None  # what the case before holds may be large
            case = Case(**asked["case"])
            ready = (key, whole(WAYS[name](case), case, asked["what"]))
        call = ready[1]
        answer = None
        if "file" in asked:
            torch.save(call(), asked["file"])
        else:
            call()
            answer = [seconds(call) for _ in range(asked["calls"])]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
