"""A plugin of attn. Asking what it offers imports this module: keep heavy libraries out of it."""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import Kernel, hookimpl

from .attend import KERNEL


@hookimpl
def attn_kernels() -> Iterator[Kernel]:
    """The kernels of this plugin; attn asks once."""
    yield KERNEL
