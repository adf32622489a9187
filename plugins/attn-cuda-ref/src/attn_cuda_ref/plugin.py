"""The kernels of this package, as kernels of attn. Neither importing this nor asking for them imports CUDA modules."""

from __future__ import annotations

from collections.abc import Iterable

from attn_core import Kernel, hookimpl

from .kernels import KERNELS


@hookimpl
def attn_kernels() -> Iterable[Kernel]:
    """cuda-ref/simple."""
    return KERNELS
