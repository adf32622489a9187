"""The most memory that a step had allocated at once, beyond what was there when it began.

Counted by torch: on CUDA by its allocator, on the CPU from the allocations that its profiler notes. What a library
takes from the system by itself is in neither. The size of the process, which would have that, is not counted: it
depends on what ran before, as freed memory is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

COUNTED = "the most that torch had allocated at once during a step, beyond the weights and inputs"


def how_measured(device: torch.device) -> str:
    """How memory is measured on that device, or that it is not."""
    return COUNTED if device.type in ("cpu", "cuda") else f"not measured: torch has no count of it on {device.type}"


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The peak of one step; None where it cannot be measured."""
    if device.type == "cuda":
        return _peak_on_cuda(step, device)
    return _peak_on_cpu(step) if device.type == "cpu" else None


def _peak_on_cuda(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Callable[[], object]) -> int | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once: else the profiler tells of itself on standard error
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()  # as on CUDA: outputs count until the step is over
        del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        return None
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
