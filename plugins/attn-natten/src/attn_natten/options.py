"""Options of NATTEN's kernels: what they may be, and what is said where no kernel takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attn_core.errors import InputError, InputTypeError

from .arguments import of_each_axis
from .no_effect import say_without_effect

#: What each says where it says nothing. In this order, the values of a call are compared with these at once.
OF_FUSED = {
    "xformers_kwargs": None,
    "q_tile_shape": None,
    "kv_tile_shape": None,
    "backward_q_tile_shape": None,
    "backward_kv_tile_shape": None,
    "backward_kv_splits": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
}
OF_ATTENTION = {
    "q_tile_size": None,
    "kv_tile_size": None,
    "backward_q_tile_size": None,
    "backward_kv_tile_size": None,
    "backward_kv_splits": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
}
NO_OPTIONS_OF_FUSED = tuple(OF_FUSED.values())
NO_OPTIONS_OF_ATTENTION = tuple(OF_ATTENTION.values())

SCHEDULES = ("non", "coop", "pp")

#: Why no kernel takes it, where that is not `OTHERWISE`.
REASONS = {
    "xformers_kwargs": "xFormers is not called: additional keys and values go to whichever kernel takes them",
    "run_persistent_kernel": "kernels schedule their tiles by themselves",
    "backward_kv_splits": "use_kv_parallelism_in_fused_na says whether NATTEN's kernels split, kv_splits how often",
}
OTHERWISE = "the kernel that runs chooses that by itself"
#: The same where a call may name a kernel that takes it.
OF_NATTEN = f"{OTHERWISE}; backend= may name one of NATTEN's, which takes it outside of graphs"


def given_options(rank: int, defaults: Mapping[str, Any], values: tuple[Any, ...]) -> dict[str, Any]:
    """Those that are given (are not their default), checked; tiles and parts as a tuple of `rank`.

    Raises InputError or InputTypeError, naming the option, for what it cannot be.
    """
    given = {}
    for (name, default), value in zip(defaults.items(), values):
        if value is not default:
            given[name] = _checked(name, value, default, rank)
    return given


def say_options_without_effect(
    function: str, names: Iterable[str], otherwise: str = OTHERWISE, stacklevel: int = 4
) -> None:
    """Warns of each option once; `stacklevel` as for `say_without_effect`, 4 at the caller of the caller."""
    for name in names:
        say_without_effect(function, name, REASONS.get(name, otherwise), stacklevel)


def _checked(name: str, value: Any, default: Any, rank: int) -> Any:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name}: takes True or False, got {value!r}")
        return value
    if name == "kernel_schedule":
        if value not in SCHEDULES:
            raise InputError(f"{name}: takes one of {', '.join(map(repr, SCHEDULES))}, or None; got {value!r}")
        return value
    if name == "xformers_kwargs":
        if not isinstance(value, Mapping):
            raise InputTypeError(f"{name}: takes a dict or None, got {type(value).__name__}")
        return value
    sizes = of_each_axis(name, value, rank)
    if min(sizes) < 1:
        raise InputError(f"{name}: must be at least 1 on each axis, got {value!r}")
    return sizes
