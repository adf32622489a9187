"""xFormers' memory-efficient attention as kernels of attn.

Asking which kernels the plugin offers imports this package, so what it offers is imported when it is first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["Manners", "__version__", "kernel_of"]


def __getattr__(name: str) -> Any:
    if name in ("kernel_of", "Manners"):
        from . import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
