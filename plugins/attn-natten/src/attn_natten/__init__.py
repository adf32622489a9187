"""Neighborhood attention as NATTEN's users know it, by whichever kernel attn picks. NATTEN need not be installed.

Asking which kernels the plugin offers imports this package, so each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: Module -> the public names that it defines.
_DEFINED_IN = {
    "errors": (
        "ConstraintError",
        "UnsupportedError",
        "UnknownBackendError",
        "NonDeterministicError",
        "DeviceError",
        "MissingLibraryError",
        "NoEffectWarning",
    ),
    "modules": ("NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"),
    "fused": ("na1d", "na2d", "na3d"),
    "plain": ("attention",),
    "merging": ("merge_attentions",),
    "unfused": ("na1d_qk", "na1d_av", "na2d_qk", "na2d_av", "na3d_qk", "na3d_av"),
    "switches.fused": ("use_fused_na", "is_fused_na_enabled", "use_fna", "is_fna_enabled"),
    "switches.kv_parallelism": ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled"),
    "switches.deterministic": ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
    "switches.memory": (
        "MemoryUsagePreference",
        "set_memory_usage_preference",
        "get_memory_usage_preference",
        "is_memory_usage_default",
        "is_memory_usage_strict",
        "is_memory_usage_unrestricted",
    ),
    "switches.dispatcher": (
        "use_gemm_na",
        "is_gemm_na_enabled",
        "use_tiled_na",
        "is_tiled_na_enabled",
        "use_tf32_in_gemm_na",
        "is_tf32_in_gemm_na_enabled",
        "enable_gemm_na",
        "disable_gemm_na",
        "enable_tiled_na",
        "disable_tiled_na",
        "enable_tf32",
        "disable_tf32",
    ),
    "switches.flex": (
        "use_flex_attention",
        "force_flex_attention",
        "is_flex_attention_enabled",
        "is_flex_attention_forced",
        "allow_flex_compile",
        "allow_flex_compile_backprop",
        "disable_flex_compile",
        "disable_flex_compile_backprop",
        "is_flex_compile_allowed",
        "is_flex_compile_backprop_allowed",
    ),
    "switches.strict": ("use_strict_checks", "are_strict_checks_enabled"),
    "machine": (
        "HAS_LIBNATTEN",
        "get_device_cc",
        "has_cuda",
        "has_half",
        "has_bfloat",
        "has_gemm",
        "has_fna",
        "has_fused_na",
        "has_tf32_gemm",
        "has_fp32_gemm",
        "has_fp64_gemm",
    ),
    "autotuner": (
        "use_autotuner",
        "disable_autotuner",
        "is_autotuner_enabled",
        "is_autotuner_enabled_for_forward",
        "is_autotuner_enabled_for_backward",
        "is_autotuner_thorough_for_forward",
        "is_autotuner_thorough_for_backward",
    ),
    "configs": (
        "get_configs_for_cutlass_fna",
        "get_bwd_configs_for_cutlass_fna",
        "get_configs_for_cutlass_hopper_fna",
        "get_bwd_configs_for_cutlass_hopper_fna",
        "get_configs_for_cutlass_blackwell_fna",
        "get_bwd_configs_for_cutlass_blackwell_fna",
        "get_configs_for_flex_fna",
        "get_configs_for_cutlass_fmha",
        "get_bwd_configs_for_cutlass_fmha",
        "get_configs_for_cutlass_hopper_fmha",
        "get_bwd_configs_for_cutlass_hopper_fmha",
        "get_configs_for_cutlass_blackwell_fmha",
        "get_bwd_configs_for_cutlass_blackwell_fmha",
        "get_configs_for_flex_fmha",
    ),
    "flops": (
        "add_natten_handle",
        "get_flops",
        "fna_flop_count",
        "na_qk_flop_count",
        "na_av_flop_count",
    ),
}
#: As of NATTEN, `attn_natten.functional.na2d` needs no other import than that of the package.
_MODULES = ("functional", "switches", "utils")
_HOME = {name: module for module, names in _DEFINED_IN.items() for name in names}

__all__ = ["__version__", *_MODULES, *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
