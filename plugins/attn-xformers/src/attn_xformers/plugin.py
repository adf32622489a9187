"""xFormers' operators, as kernels of attn. Neither importing this module nor asking for them imports xFormers."""

from __future__ import annotations

from collections.abc import Iterable

from attn_core import Kernel, hookimpl

from . import library
from .kernels import KERNELS


@hookimpl
def attn_kernels() -> Iterable[Kernel]:
    """A kernel for each forward operator that xFormers registers, with the backward that goes with it."""
    library.XFORMERS.forget()  # the registry asks again after `refresh()`, as when something was installed
    return KERNELS
