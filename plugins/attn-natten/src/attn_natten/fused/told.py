"""Options of NATTEN's kernels in a fused call: told to the kernel of NATTEN that it names, said to have no effect else.

A kernel that nobody named may be any, whose tiles mean something else or nothing; so only one that is named is told.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..autotuner.families import FAMILIES
from ..autotuner.natten_tiles import NattenTiles
from ..backends import FNA
from ..log import logger
from ..options import OF_FUSED, OF_NATTEN, given_options, say_options_without_effect
from ..switches.deterministic import must_be_deterministic
from ..switches.kv_parallelism import is_kv_parallelism_asked_about, is_kv_parallelism_in_fused_na_enabled

#: Option -> (whether it is of the backward, what `NattenTiles` calls it).
TOLD = {
    "q_tile_shape": (False, "q_tile"),
    "kv_tile_shape": (False, "kv_tile"),
    "kernel_schedule": (False, "schedule"),
    "backward_q_tile_shape": (True, "q_tile"),
    "backward_kv_tile_shape": (True, "kv_tile"),
    "backward_kv_splits": (True, "kv_splits"),
    "backward_use_pt_reduction": (True, "use_pt_reduction"),
}


def told(function: str, rank: int, backend: str | None, values: tuple[Any, ...]) -> AbstractContextManager[None]:
    """The scope in which a call runs with these options, of which no kernel of another name takes any.

    Where a mode is deterministic, or KV parallelism was turned off, keys and values are one part in the backward
    whatever was asked; the log warns of that. Raises what `given_options` does.
    """
    given = given_options(rank, OF_FUSED, values)
    taken = TOLD if backend in FNA and not torch.compiler.is_dynamo_compiling() else {}
    say_options_without_effect(function, [name for name in given if name not in taken], OF_NATTEN, 5)
    if not any(name in taken for name in given):
        return nullcontext()
    if max(given.get("backward_kv_splits", (1,))) > 1 and not may_split():
        logger.warning("%s: backward_kv_splits is 1 on each axis, not %s", function, given["backward_kv_splits"])
        given["backward_kv_splits"] = (1,) * rank
    of_pass: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, value in given.items():
        if name in taken:
            backward, called = taken[name]
            of_pass[backward][called] = value
    return FAMILIES[f"natten/{backend}"].within(*(NattenTiles(**values) for values in of_pass))


def may_split() -> bool:
    """Whether a backward may be split over keys and values here and now."""
    if must_be_deterministic():
        return False
    return is_kv_parallelism_in_fused_na_enabled() or not is_kv_parallelism_asked_about()
