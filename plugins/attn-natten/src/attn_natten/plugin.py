"""NATTEN's kernels, as kernels of attn. Neither importing this module nor asking for them imports NATTEN."""

from __future__ import annotations

from collections.abc import Iterable

from attn_core import Kernel, hookimpl

from . import library
from .kernels import KERNELS


@hookimpl
def attn_kernels() -> Iterable[Kernel]:
    """The kernels of NATTEN's two families: neighborhood attention (`*-fna`) and dense attention (`*-fmha`)."""
    library.NATTEN.forget()  # the registry asks again after `refresh()`, as when something was installed
    return KERNELS
