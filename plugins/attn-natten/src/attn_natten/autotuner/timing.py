"""How long a configuration takes: the sum of so many runs, after others that are not counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, TypeVar

import torch

from ..log import logger

Configuration = TypeVar("Configuration")


def seconds(run: Callable[[], object], warmup_steps: int, steps: int, device: torch.device) -> float:
    """Of `steps` runs together, the device being waited for before and behind them."""
    for _ in range(warmup_steps):
        run()
    synchronize(device)
    start = perf_counter()
    for _ in range(steps):
        run()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()


def fastest(
    configurations: Sequence[Configuration],
    within: Callable[[Configuration], AbstractContextManager[Callable[[], Any]]],
    warmup_steps: int,
    steps: int,
    device: torch.device,
    tell: Callable[[Configuration, float], None] = lambda configuration, total: None,
) -> Configuration:
    """The configuration whose runs take the least together; of equal ones the first.

    `within(configuration)` gives what is run, in a scope of its own. `tell` is told the total of each. One that raises
    RuntimeError, for want of memory or another reason, is logged and never the fastest.
    """
    best, least = configurations[0], float("inf")
    for configuration in configurations:
        try:
            with within(configuration) as run:
                total = seconds(run, warmup_steps, steps, device)
        except RuntimeError as error:  # out of memory, or what a device cannot launch: another one may do
            logger.warning("autotuner: %s cannot run: %s", configuration, error)
            total = float("inf")
        tell(configuration, total)
        if total < least:
            best, least = configuration, total
    return best
