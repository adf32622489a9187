"""The switch of the autotuner: for the whole process, as NATTEN's is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from threading import Lock

import torch
from attn_core.errors import InputError

from ..errors import NonDeterministicError
from ..log import logger
from ..switches.deterministic import are_deterministic_algorithms_enabled, must_be_deterministic
from ..switches.effect import Effect


@dataclass(frozen=True)
class Settings:
    """What `use_autotuner` says, by the names of its arguments."""

    forward_pass: bool = False
    backward_pass: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False
    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5

    @property
    def on(self) -> bool:
        return self.forward_pass or self.backward_pass


class State:
    """The settings in force; replaced as a whole, so that whoever reads them needs no lock."""

    settings = Settings()


#: Held while settings are read, changed and put back.
_lock = Lock()
#: What a number of steps may be, at the least.
FEWEST = {
    "warmup_steps_forward": 0,
    "warmup_steps_backward": 0,
    "steps_forward": 1,
    "steps_backward": 1,
}


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Turns the autotuner on or off, for fused neighborhood attention in this process.

    Each new problem (shapes, dtype, device, parameters of the neighborhood) is timed once in every configuration, and
    runs in the fastest from then on. The first call of a problem is therefore slow: this is for shapes that rarely
    change. Configurations differ in their rounding, so two processes, or the workers of a distributed training, may
    differ in the last digits. What is found is kept for 256 problems in each direction, and not saved.

    Args:
        forward_pass: tune forward passes. At first it is off.
        backward_pass: tune backward passes, of calls that need gradients. At first it is off.
        thorough_mode_forward, thorough_mode_backward: try all configurations, not just the likely ones.
        warmup_steps_forward, warmup_steps_backward: runs of a configuration before it is timed, 0 or more; 5 at first.
        steps_forward, steps_backward: runs of which the total is compared, 1 or more; 5 at first.

    None leaves a setting as it is. With `forward_pass=False, backward_pass=False` the rest is not looked at but for its
    type: the autotuner is off, and thorough modes and steps stay as they are. Tuning is ignored, with a logged warning,
    under `torch.use_deterministic_algorithms(True)`: nothing is changed then. Turning it on logs a warning.

    Raises:
        InputError: a mode that is not a bool, or a number of steps that is not an int in range. Nothing is changed.
        NonDeterministicError: tuning is asked for in the deterministic mode of this package. Nothing is changed.
    """
    given = _checked(
        forward_pass=forward_pass,
        backward_pass=backward_pass,
        thorough_mode_forward=thorough_mode_forward,
        thorough_mode_backward=thorough_mode_backward,
        warmup_steps_forward=warmup_steps_forward,
        warmup_steps_backward=warmup_steps_backward,
        steps_forward=steps_forward,
        steps_backward=steps_backward,
    )
    if forward_pass is False and backward_pass is False:
        given = {"forward_pass": False, "backward_pass": False}
    elif forward_pass or backward_pass:
        if torch.are_deterministic_algorithms_enabled():
            logger.warning(
                "use_autotuner: ignored, since torch.use_deterministic_algorithms(True) is in force, and configurations"
                " differ in their rounding"
            )
            return
        if are_deterministic_algorithms_enabled():
            asked = " and ".join(name for name in ("forward_pass", "backward_pass") if given.get(name))
            raise NonDeterministicError(
                f"use_autotuner: {asked} takes False or None after attn_natten.use_deterministic_algorithms(), got"
                " True; configurations differ in their rounding"
            )
    with _lock:
        State.settings = replace(State.settings, **given)  # type: ignore[arg-type]
    if forward_pass:
        logger.warning("autotuner: on for forward passes; the first call of each new problem is slow")
    if backward_pass:
        logger.warning(
            "autotuner: on for backward passes; not recommended in distributed training, where each process would"
            " find configurations of its own"
        )


def _checked(**given: bool | int | None) -> dict[str, bool | int]:
    """What is given, by name. Raises InputError."""
    for name, value in given.items():
        if value is None:
            continue
        if name not in FEWEST:
            if not isinstance(value, bool):
                raise InputError(f"use_autotuner: {name} takes True, False or None, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < FEWEST[name]:
            raise InputError(f"use_autotuner: {name} takes an int >= {FEWEST[name]} or None, got {value!r}")
    return {name: value for name, value in given.items() if value is not None}


def disable_autotuner() -> None:
    """Turns the autotuner and its thorough modes off; numbers of steps, and what was found, stay."""
    off = {field.name: False for field in fields(Settings) if field.name not in FEWEST}
    with _lock:
        State.settings = replace(State.settings, **off)


def is_autotuner_enabled() -> bool:
    """Whether passes of either direction are tuned."""
    return State.settings.on


def is_autotuner_enabled_for_forward() -> bool:
    """False until `use_autotuner(forward_pass=True)`."""
    return State.settings.forward_pass


def is_autotuner_enabled_for_backward() -> bool:
    """False until `use_autotuner(backward_pass=True)`."""
    return State.settings.backward_pass


def is_autotuner_thorough_for_forward() -> bool:
    """False until `use_autotuner(thorough_mode_forward=True)`."""
    return State.settings.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """False until `use_autotuner(thorough_mode_backward=True)`."""
    return State.settings.thorough_mode_backward


def effects() -> list[Effect]:
    """What the switch changes here; one of `attn_natten.switches.effects()`."""
    settings = State.settings
    if not settings.on:
        text = "kernels run in their own configuration"
    elif must_be_deterministic():
        text = "kernels run in their own configuration while the deterministic mode lasts"
    else:
        passes = " and ".join(name for name in ("forward", "backward") if getattr(settings, f"{name}_pass"))
        text = f"{passes} passes of new problems are timed in each configuration, and run in the fastest"
    return [Effect(name="autotuner", value=settings.on, effect=text)]
