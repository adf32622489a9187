"""What a switch changes here, as data; and the one warning of a switch that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from ..no_effect import say_without_effect

THIS_SWITCH = "this switch"

#: The kernels that split their backward pass over keys and values.
SPLITTING = ("natten/cutlass-fna", "natten/cutlass-fmha")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One switch: its value now, and what runs differently because of it, or why nothing does."""

    name: str
    value: object
    effect: str
    works: bool = True  #: whether it can change what runs, on this machine

    def __str__(self) -> str:
        return f"{self.name} = {self.value}: {self.effect if self.works else f'no effect here: {self.effect}'}"


def say_no_effect(function: str, why: str) -> None:
    """Warns, once in a process for each function, that calling it changes nothing here; at the caller's caller."""
    say_without_effect(function, THIS_SWITCH, why, stacklevel=4)


def splits_somewhere() -> bool:
    """Whether a kernel is ready that can split its backward pass. Loads the plugins."""
    from attn_core import is_available

    return any(is_available(kernel) for kernel in SPLITTING)


NOTHING_SPLITS = f"none of {', '.join(SPLITTING)} is ready, and no other kernel splits its backward pass"
