"""How much memory KV parallelism may take."""

from __future__ import annotations

from enum import Enum

from attn_core.errors import InputError

from .effect import NOTHING_SPLITS, SPLITTING, Effect, say_no_effect, splits_somewhere


class MemoryUsagePreference(Enum):
    """What `set_memory_usage_preference` sets; members as in NATTEN."""

    Default = 0
    Strict = 1
    Unrestricted = 2


_NAMED = {preference.name.lower(): preference for preference in MemoryUsagePreference}


class _State:
    preference = MemoryUsagePreference.Default


def set_memory_usage_preference(pref: str = "default") -> None:
    """Limits KV parallelism: "default"; "strict", more so; "unrestricted", by the size of a CUDA grid alone.

    `attn_natten.kv_splits` has the numbers. Warns, once, where no kernel is ready that splits. Raises InputError for
    another word.
    """
    if not isinstance(pref, str) or pref not in _NAMED:
        raise InputError(f"set_memory_usage_preference: pref takes {', '.join(map(repr, _NAMED))}, got {pref!r}")
    _State.preference = _NAMED[pref]
    if not splits_somewhere():
        say_no_effect("set_memory_usage_preference", NOTHING_SPLITS)


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The preference in force; `MemoryUsagePreference.Default` at first."""
    return _State.preference


def is_memory_usage_default() -> bool:
    """Whether the preference in force is "default"."""
    return _State.preference is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the preference in force is "strict"."""
    return _State.preference is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the preference in force is "unrestricted"."""
    return _State.preference is MemoryUsagePreference.Unrestricted


def effects() -> list[Effect]:
    works = splits_somewhere()
    text = f"bounds the splits of {' and '.join(SPLITTING)}" if works else NOTHING_SPLITS
    return [Effect(name="memory_usage_preference", value=_State.preference, effect=text, works=works)]
