"""The kernels, declared; importing this imports nothing of CUDA."""

from __future__ import annotations

from . import simple

KERNELS = (simple.KERNEL,)

__all__ = ["KERNELS"]
