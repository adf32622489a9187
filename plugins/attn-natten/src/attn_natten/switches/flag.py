"""One bool for the process, as NATTEN's switches are.

Reading takes no lock, so that a compiled graph can read it (and is traced anew where it changed). Setting one flag is
atomic; a switch that sets several holds LOCK, so that no thread sees a state that nobody asked for.
"""

from __future__ import annotations

from threading import RLock

from attn_core.errors import InputError

LOCK = RLock()


class Flag:
    """A bool with a name."""

    def __init__(self, name: str, value: bool = False) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"Flag({self.name!r}, {self.value})"

    def set(self, mode: bool, function: str) -> None:
        """Raises InputError, naming the function that was called, for a mode that is not a bool."""
        self.value = checked_mode(mode, function)


def checked_mode(mode: bool, function: str, name: str = "mode") -> bool:
    """`mode`, where it is a bool. Raises InputError."""
    if not isinstance(mode, bool):
        raise InputError(f"{function}: {name} takes True or False, got {mode!r}")
    return mode
