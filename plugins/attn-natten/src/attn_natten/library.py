"""Which NATTEN is installed, and whether its kernels can be there.

Forced by what an installed NATTEN can be beside what any library can: built without its CUDA library, or with one for
another torch, which is hidden: NATTEN takes an extension that cannot be loaded for one that was not built.
"""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch
from attn_core import Unusable
from attn_core.library import Library
from attn_core.tracing import constant

SUPPORTED = ">=0.21,<0.22"
NATTEN = Library(
    name="NATTEN",
    distribution="natten",
    supported=SUPPORTED,
    modules=("natten",),
    install="pip install 'attn-natten[natten]'",
    # It builds its CUDA library where a GPU is seen, or where it is told for which ones.
    rebuild="NATTEN_CUDA_ARCH='8.0;9.0' pip install --force-reinstall --no-deps --no-build-isolation"
    f" 'natten{SUPPORTED}'",
    version_in="natten",
)


def unusable(*, libnatten: bool) -> Unusable | None:
    """Why no kernel of NATTEN can run here, or None; `libnatten`: one of those that it wrote in CUDA.

    Raises BrokenLibraryError where importing NATTEN raises.
    """
    found = NATTEN.unusable()
    return _without_libnatten(NATTEN.module()) if found is None and libnatten else found


def _without_libnatten(module: ModuleType) -> Unusable | None:
    if module.HAS_LIBNATTEN:
        return None
    if PathFinder.find_spec("natten.libnatten", list(module.__path__)) is None:
        return Unusable("unavailable", f"{NATTEN} is built without libnatten, its CUDA kernels", NATTEN.rebuild)
    try:
        import_module("natten.libnatten")
        reason = "no reason is given"
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
    text = f"the libnatten of {NATTEN} cannot be loaded beside torch {torch.__version__}: {reason}"
    return Unusable("unavailable", text, NATTEN.rebuild)


@constant
def has_torch_ops() -> bool:
    """Whether NATTEN's CUDA kernels are ops of torch, which a graph can hold."""
    environment: Any = import_module("natten.utils.environment")
    return not getattr(environment, "DISABLE_TORCH_OPS", True)
