"""NATTEN's switches for the whole process, one state per file. `effects()` says what each changes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .effect import Effect

#: Each has `effects()`.
_MODULES = (
    ".switches.fused",
    ".switches.flex",
    ".switches.kv_parallelism",
    ".switches.memory",
    ".switches.deterministic",
    ".autotuner",
    ".switches.strict",
    ".switches.dispatcher",
)


def effects() -> list[Effect]:
    """Every switch: its value, and what runs differently because of it, or why nothing does on this machine.

        for effect in attn_natten.switches.effects():
            print(effect)

    Asks which kernels are ready, so it loads the plugins.
    """
    return [effect for name in _MODULES for effect in import_module(name, "attn_natten").effects()]
