"""Which kernels have configurations, and of what kind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from attn_core import Neighborhood, Problem
from attn_core.errors import InputError

from . import natten_tiles, tiles


class Family(Protocol):
    """Kernels whose configurations are of one kind: values that compare, print, and mean the same in any process."""

    def configurations(self, problem: Problem, *, backward: bool, thorough: bool) -> list[Any]:
        """Those that can run the problem, whose bias is a Neighborhood; the kernel's own first."""
        ...

    def within(self, forward: Any | None, backward: Any | None) -> AbstractContextManager[None]:
        """The scope in which calls run in these; None is the kernel's own."""
        ...

    def written(self, configuration: Any) -> dict[str, Any]:
        """Plain data, for JSON."""
        ...

    def read(self, written: dict[str, Any]) -> Any:
        """The configuration that was written. Raises InputError for what is none."""
        ...

    def from_words(self, words: dict[str, Any]) -> Any:
        """The configuration that a command line says: any of q_tile, kv_tile and schedule. Raises InputError."""
        ...


class Untunable:
    """Kernels that choose how they run by themselves: None is their only configuration."""

    def configurations(self, problem: Problem, *, backward: bool, thorough: bool) -> list[None]:
        return [None]

    def within(self, forward: None, backward: None) -> AbstractContextManager[None]:
        return nullcontext()

    def written(self, configuration: None) -> dict[str, Any]:
        return {}

    def read(self, written: dict[str, Any]) -> None:
        if written:
            raise InputError(f"configuration: this kernel has none, got {written!r}")

    def from_words(self, words: dict[str, Any]) -> None:
        got = ", ".join(f"{name}={value!r}" for name, value in words.items())
        raise InputError(f"chooses how it runs by itself, got {got}")


UNTUNABLE = Untunable()
#: Kernel -> its family.
FAMILIES: dict[str, Family] = {
    "torch/tiled": tiles.TILED,
    **{kernel: natten_tiles.OfNatten(kernel) for kernel in natten_tiles.FINDERS},
}


def family_of(kernel: str, problem: Problem) -> Family | None:
    """The family of a kernel, where it has configurations for this problem."""
    return FAMILIES.get(kernel) if isinstance(problem.bias, Neighborhood) else None
