"""The built-in plugin: torch's own kernels, one file each, registered by the same entry-point group as anyone's."""

from __future__ import annotations

from collections.abc import Iterator

from ..hookspecs import hookimpl
from ..kernel import Kernel
from . import cudnn, efficient, fa_window, flash, flex, math, reference, tiled, varlen


@hookimpl
def attn_kernels() -> Iterator[Kernel]:
    yield cudnn.KERNEL
    yield efficient.KERNEL
    yield fa_window.KERNEL
    yield flash.KERNEL
    yield flex.KERNEL
    yield math.KERNEL
    yield reference.KERNEL
    yield tiled.KERNEL
    yield varlen.KERNEL
