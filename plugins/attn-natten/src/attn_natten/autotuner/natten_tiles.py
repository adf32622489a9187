"""Configurations of NATTEN's kernels: those that NATTEN itself says it has for a problem.

    natten/cutlass-fna     tiles forward and backward, and parts of keys and values in the backward
    natten/hopper-fna      tiles forward, with a schedule, and backward
    natten/blackwell-fna   tiles forward and backward
    natten/flex-fna        tiles forward

NATTEN answers for tensors of its device, so a problem has these configurations where its GPU is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from attn_core import Neighborhood, Problem
from attn_core.errors import InputError

from .. import library
from ..kv_splits import kv_splits, max_kv_splits
from ..switches.kv_parallelism import is_kv_parallelism_in_fused_na_enabled

#: Kernel -> (NATTEN's function that lists forward configurations, and backward ones).
FINDERS = {
    "natten/cutlass-fna": ("get_configs_for_cutlass_fna", "get_bwd_configs_for_cutlass_fna"),
    "natten/hopper-fna": ("get_configs_for_cutlass_hopper_fna", "get_bwd_configs_for_cutlass_hopper_fna"),
    "natten/blackwell-fna": ("get_configs_for_cutlass_blackwell_fna", "get_bwd_configs_for_cutlass_blackwell_fna"),
    "natten/flex-fna": ("get_configs_for_flex_fna", None),
}
#: NATTEN's members of KernelSchedule, by the words that it takes for them.
SCHEDULES = {"NonPersistent": "non", "WarpSpecializedCooperative": "coop", "WarpSpecializedPingpong": "pp"}


@dataclass(frozen=True, kw_only=True)
class NattenTiles:
    """How a kernel of NATTEN runs in one direction; what is None is its own."""

    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None
    schedule: str | None = None  #: "non", "coop" or "pp"
    kv_splits: tuple[int, ...] | None = None  #: parts of keys and values on each axis
    use_pt_reduction: bool | None = None  #: sum over them by torch


OWN = NattenTiles()


def options(forward: NattenTiles | None, backward: NattenTiles | None) -> dict[str, Any]:
    """The arguments of NATTEN's functions that say so; none for what is the kernel's own."""
    ahead, back = forward or OWN, backward or OWN
    said = {
        "q_tile_shape": ahead.q_tile,
        "kv_tile_shape": ahead.kv_tile,
        "kernel_schedule": ahead.schedule,
        "backward_q_tile_shape": back.q_tile,
        "backward_kv_tile_shape": back.kv_tile,
        "backward_kv_splits": back.kv_splits,
        "backward_use_pt_reduction": back.use_pt_reduction,
    }
    return {name: value for name, value in said.items() if value is not None}


_chosen: ContextVar[dict[str, Any] | None] = ContextVar("attn_natten_chosen", default=None)


def chosen_options() -> dict[str, Any]:
    """What a kernel is to pass on to NATTEN, here and now; nothing while a graph is traced."""
    if torch.compiler.is_dynamo_compiling():
        return {}
    return _chosen.get() or {}


@contextmanager
def _choosing(said: dict[str, Any]) -> Iterator[None]:
    token = _chosen.set({**(_chosen.get() or {}), **said})  # what is not said here stays as it is said around
    try:
        yield
    finally:
        _chosen.reset(token)


class OfNatten:
    """The family of one kernel of NATTEN."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def configurations(self, problem: Problem, *, backward: bool, thorough: bool) -> list[NattenTiles]:
        """The kernel's own first, then those that NATTEN lists for operands like these."""
        finder = FINDERS[self.kernel][backward]
        mask = problem.bias
        assert isinstance(mask, Neighborhood)
        if finder is None or not _is_there(problem):
            return [OWN]
        found = [_read(each) for each in getattr(library.NATTEN.module(), finder)(*_operands(problem, mask))]
        if backward and self.kernel == "natten/cutlass-fna" and is_kv_parallelism_in_fused_na_enabled():
            found = [split for each in found for split in _splits(each, problem, mask, thorough)]
        return list(dict.fromkeys([OWN, *found]))

    def within(self, forward: NattenTiles | None, backward: NattenTiles | None) -> AbstractContextManager[None]:
        return _choosing(options(forward, backward))

    def written(self, configuration: NattenTiles) -> dict[str, Any]:
        """The same by name, without what is the kernel's own."""
        return {name: value for name, value in asdict(configuration).items() if value is not None}

    def read(self, written: dict[str, Any]) -> NattenTiles:
        known = [field.name for field in fields(NattenTiles)]
        for name, value in written.items():
            if name not in known:
                raise InputError(f"tiles of {self.kernel}: takes {', '.join(known)}, got {name!r}")
            if name in ("q_tile", "kv_tile", "kv_splits") and not _is_sizes(value):
                raise InputError(f"tiles of {self.kernel}: {name} takes ints >= 1, got {value!r}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
        return NattenTiles(**values)

    def from_words(self, words: dict[str, Any]) -> NattenTiles:
        if ("q_tile" in words) != ("kv_tile" in words):
            raise InputError(f"takes q_tile and kv_tile together, got {', '.join(words)}")
        if "schedule" in words and self.kernel != "natten/hopper-fna":
            raise InputError(f"has no schedule, got {words['schedule']!r}")
        return self.read(words)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(size) is int and size >= 1 for size in value)


def _is_there(problem: Problem) -> bool:
    """Whether a device is in this machine that NATTEN can be asked about."""
    return problem.device != "cuda" or torch.cuda.is_available()


def _operands(problem: Problem, mask: Neighborhood) -> list[torch.Tensor]:
    """As small as they may be: NATTEN looks at rank, dtype, device, heads and head dims."""
    tokens = (1,) * len(mask.extents)
    sizes = (
        (problem.num_heads, problem.head_dim),
        (problem.num_kv_heads, problem.head_dim),
        (problem.num_kv_heads, problem.head_dim_v),
    )
    return [torch.empty(1, *tokens, *size, dtype=problem.dtype, device=problem.device) for size in sizes]


def _read(listed: Any) -> NattenTiles:
    """(q_tile, kv_tile), or ((q_tile, kv_tile), schedule)."""
    first, second = listed
    schedule = getattr(second, "name", None)
    if schedule is None:
        return NattenTiles(q_tile=tuple(first), kv_tile=tuple(second))
    q_tile, kv_tile = first
    return NattenTiles(q_tile=tuple(q_tile), kv_tile=tuple(kv_tile), schedule=SCHEDULES[schedule])


def _splits(tiles: NattenTiles, problem: Problem, mask: Neighborhood, thorough: bool) -> Iterator[NattenTiles]:
    """One part and the most parts that are allowed; with `thorough` all numbers, summed by either."""
    assert tiles.kv_tile is not None  # NATTEN lists it
    one = (1,) * len(mask.extents)
    allowed = kv_splits(mask.extents, tiles.kv_tile, mask.dilation, problem.batch, problem.num_heads)
    if not thorough:
        for parts in dict.fromkeys((one, allowed)):
            yield replace(tiles, kv_splits=parts, use_pt_reduction=False)
        return
    most = max_kv_splits(mask.extents, tiles.kv_tile, mask.dilation)
    ranges = [range(1, min(limit, cap) + 1) for limit, cap in zip(allowed, most)]
    for parts in itertools.product(*ranges):
        for by_torch in (False, True):
            yield replace(tiles, kv_splits=parts, use_pt_reduction=by_torch)
