"""`natten.functional` by its names, of NATTEN 0.17, of 0.20 and later, and of models that are older than both.

Everything is defined elsewhere, and imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Module -> the names of it that are found here.
_DEFINED_IN = {
    "fused": ("na1d", "na2d", "na3d"),
    "unfused": ("na1d_qk", "na1d_av", "na2d_qk", "na2d_av", "na3d_qk", "na3d_av"),
    "plain": ("attention",),
    "merging": ("merge_attentions",),
    "machine": (
        "get_device_cc",
        "has_bfloat",
        "has_cuda",
        "has_fna",
        "has_fp32_gemm",
        "has_fp64_gemm",
        "has_fused_na",
        "has_gemm",
        "has_half",
        "has_tf32_gemm",
    ),
    "switches.dispatcher": (
        "disable_gemm_na",
        "disable_tf32",
        "disable_tiled_na",
        "enable_gemm_na",
        "enable_tf32",
        "enable_tiled_na",
    ),
    "old_names": (
        "natten1dav",
        "natten1dqk",
        "natten1dqkrpb",
        "natten2dav",
        "natten2dqk",
        "natten2dqkrpb",
        "natten3dav",
        "natten3dqk",
        "natten3dqkrpb",
    ),
}
_HOME = {name: module for module, names in _DEFINED_IN.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"attn_natten.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
