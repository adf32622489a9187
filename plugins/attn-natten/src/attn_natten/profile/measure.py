"""Seconds of a fused call, by one kernel in one configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from attn_core import record
from torch import Tensor

from .. import fused
from ..autotuner.families import Family
from ..autotuner.timing import synchronize
from .case import Case

CALLS = {1: fused.na1d, 2: fused.na2d, 3: fused.na3d}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one direction: seconds of each run, and the kernels that ran."""

    direction: str
    kernels: tuple[str, ...]
    seconds: tuple[float, ...]
    flops: int

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(
    case: Case,
    kernel: str | None,
    family: Family,
    forward: Any,
    backward: Any,
    *,
    warmup_steps: int,
    steps: int,
    tell: Callable[[], None] = lambda: None,
) -> list[Times]:
    """Times of the forward and, where gradients are wanted, the backward of a whole call, additional keys included.

    `kernel` None is the one that the core picks. `tell` is called behind each run. Raises what the call raises.
    """
    query, key, value, keys, values = case.operands()
    device = query.device

    def call() -> Tensor:
        out: Tensor = CALLS[case.rank](
            query,
            key,
            value,
            case.kernel_size,
            stride=case.stride,
            dilation=case.dilation,
            is_causal=case.is_causal,
            additional_keys=keys,
            additional_values=values,
            backend=kernel,
        )
        return out

    leaves = [x for x in (query, key, value, keys, values) if x is not None]
    with torch.set_grad_enabled(case.backward), family.within(forward, backward):
        with record() as calls:
            out = call()
        kernels = tuple(dict.fromkeys(row.kernel for row in calls))
        seconds = timed(call, warmup_steps, steps, device, tell)
        found = [Times(direction="forward", kernels=kernels, seconds=seconds, flops=case.flops(backward=False))]
        if case.backward:
            grad = torch.ones_like(out)
            seconds = timed(
                lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), warmup_steps, steps, device, tell
            )
            found.append(Times(direction="backward", kernels=kernels, seconds=seconds, flops=case.flops(backward=True)))
    return found


def timed(
    run: Callable[[], object], warmup_steps: int, steps: int, device: torch.device, tell: Callable[[], None]
) -> tuple[float, ...]:
    """Seconds of each of `steps` runs."""
    for _ in range(warmup_steps):
        run()
        tell()
    found = []
    for _ in range(steps):
        synchronize(device)
        start = perf_counter()
        run()
        synchronize(device)
        found.append(perf_counter() - start)
        tell()
    return tuple(found)
