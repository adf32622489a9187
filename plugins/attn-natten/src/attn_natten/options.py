"""Options of NATTEN's kernels. Those of attn choose their tiles by themselves: such an option is checked, and said once
to be without effect."""

from __future__ import annotations

from collections.abc import Mapping
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

TILES = "a kernel chooses its tiles by itself; the autotuner (use_autotuner) tries others"
REASONS = {
    "xformers_kwargs": "xFormers is not called: additional keys and values go to whichever kernel takes them",
    "backward_kv_splits": "use_kv_parallelism_in_fused_na says whether NATTEN's kernels split, and kv_splits into how many",
    "backward_use_pt_reduction": "kernels sum what the backward needs by themselves",
    "run_persistent_kernel": "kernels schedule their tiles by themselves",
    "kernel_schedule": "kernels schedule their tiles by themselves",
    "torch_compile": "no kernel is compiled when it is called; torch.compile around the call compiles it",
}


def say_options_without_effect(
    function: str, rank: int, defaults: Mapping[str, Any], values: tuple[Any, ...], stacklevel: int = 4
) -> None:
    """Checks the options that are given (are not their default), and warns of each once.

    Raises InputError or InputTypeError, naming the option, for what it cannot be.
    """
    for (name, default), value in zip(defaults.items(), values):
        if value is not default:
            _check(name, value, default, rank)
            say_without_effect(function, name, REASONS.get(name, TILES), stacklevel)


def _check(name: str, value: Any, default: Any, rank: int) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name}: takes True or False, got {value!r}")
    elif name == "kernel_schedule":
        if value not in SCHEDULES:
            raise InputError(f"{name}: takes one of {', '.join(map(repr, SCHEDULES))}, or None; got {value!r}")
    elif name == "xformers_kwargs":
        if not isinstance(value, Mapping):
            raise InputTypeError(f"{name}: takes a dict or None, got {type(value).__name__}")
    elif min(of_each_axis(name, value, rank)) < 1:
        raise InputError(f"{name}: must be at least 1 on each axis, got {value!r}")
