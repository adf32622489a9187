"""The deterministic mode of this package, beside torch's."""

from __future__ import annotations

import torch

from ..log import logger
from .effect import Effect
from .flag import Flag

DETERMINISTIC = Flag("deterministic_algorithms")


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Forbids KV parallelism and the autotuner: asking for either raises NonDeterministicError.

    Where they are on already, they are left out while the mode lasts. Turning it on logs a warning.

    Raises InputError for a mode that is not a bool.
    """
    DETERMINISTIC.set(mode, "use_deterministic_algorithms")
    if mode:
        logger.warning("deterministic mode: without the autotuner and KV parallelism")


def are_deterministic_algorithms_enabled() -> bool:
    """False until `use_deterministic_algorithms()`; torch's own mode does not count."""
    return DETERMINISTIC.value


def must_be_deterministic() -> bool:
    """Whether this mode or torch's is on."""
    return DETERMINISTIC.value or torch.are_deterministic_algorithms_enabled()


def effects() -> list[Effect]:
    text = "the autotuner and KV parallelism stay off" if must_be_deterministic() else "none is forbidden"
    return [Effect(name=DETERMINISTIC.name, value=DETERMINISTIC.value, effect=text)]
