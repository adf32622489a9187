"""Imports NATTEN 0.17.5, the last release with kernels for CPUs and unfused ops, beside a torch that is newer than it.

Two names that it takes from torch.cuda at import are not there any more, or ask a GPU that may not be; both are given
to it here, and nothing of NATTEN is changed.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

VERSION = "0.17.5"


def is_installed() -> bool:
    """Whether it is this release that `import natten` would find: others have the same name."""
    try:
        return version("natten") == VERSION
    except PackageNotFoundError:
        return False


def natten_0_17() -> ModuleType:
    """The module `natten.functional` of that release. Raises RuntimeError where another one is installed, or none."""
    if not is_installed():
        raise RuntimeError(f"NATTEN {VERSION} is not installed: `nox -s natten_old` builds it")
    import torch

    cuda: Any = torch.cuda
    if not hasattr(cuda, "_device_t"):
        cuda._device_t = torch.device | str | int | None
    if not torch.cuda.is_available():
        cuda.get_device_capability = lambda device=None: (0, 0)
    return importlib.import_module("natten.functional")
