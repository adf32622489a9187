"""NATTEN's switches for the whole process, one state per file. `effects()` says what each changes here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .effect import Effect

#: Each has `effects()`.
_FILES = ("fused", "flex", "kv_parallelism", "memory", "deterministic", "strict", "dispatcher")


def effects() -> list[Effect]:
    """Every switch: its value, and what runs differently because of it, or why nothing does on this machine.

        for effect in attn_natten.switches.effects():
            print(effect)

    Asks which kernels are ready, so it loads the plugins.
    """
    return [effect for name in _FILES for effect in import_module(f".{name}", __name__).effects()]
