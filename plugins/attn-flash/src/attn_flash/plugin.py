"""FlashAttention's kernels, as kernels of attn. Neither importing this module nor asking for them imports a library."""

from __future__ import annotations

from collections.abc import Iterable

from attn_core import Kernel, hookimpl

from . import library
from .kernels import KERNELS


@hookimpl
def attn_kernels() -> Iterable[Kernel]:
    """One kernel per generation of FlashAttention: flash/fa2, flash/fa3, flash/fa4."""
    library.forget()  # the registry asks again after `refresh()`, as when something was installed
    return KERNELS
