"""The settings of NATTEN 0.17's dispatcher: which kernels its unfused operations might run.

They were kernels for CUDA, dropped by NATTEN 0.20, and there is nothing like them here. So the getters say what was
set, as they did, and every setter warns, once, that it has no effect here.
"""

from __future__ import annotations

import warnings

from ..no_effect import say_without_effect
from .effect import THIS_SWITCH, Effect, say_no_effect
from .flag import Flag

GEMM = Flag("gemm_na", True)
TILED = Flag("tiled_na", True)
TF32 = Flag("tf32_in_gemm_na", True)

WHY_NOT = {
    GEMM.name: "there are no GEMM kernels; unfused operations run by torch's own",
    TILED.name: "there are no tiled kernels for qk; unfused operations run by torch's own",
    TF32.name: "there are no GEMM kernels; torch.backends.cuda.matmul.fp32_precision says whether torch's use TF32",
}


def use_gemm_na(mode: bool = True) -> None:
    """Sets what `is_gemm_na_enabled` says, and nothing else: warns of that, once. Raises InputError for no bool."""
    GEMM.set(mode, "use_gemm_na")
    say_no_effect("use_gemm_na", WHY_NOT[GEMM.name])


def is_gemm_na_enabled() -> bool:
    """What `use_gemm_na` set; True at first."""
    return GEMM.value


def use_tiled_na(mode: bool = True) -> None:
    """Sets what `is_tiled_na_enabled` says, and nothing else: warns of that, once. Raises InputError for no bool."""
    TILED.set(mode, "use_tiled_na")
    say_no_effect("use_tiled_na", WHY_NOT[TILED.name])


def is_tiled_na_enabled() -> bool:
    """What `use_tiled_na` set; True at first."""
    return TILED.value


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """Sets what `is_tf32_in_gemm_na_enabled` says, and nothing else: warns of that, once. Raises as the others do."""
    TF32.set(mode, "use_tf32_in_gemm_na")
    say_no_effect("use_tf32_in_gemm_na", WHY_NOT[TF32.name])


def is_tf32_in_gemm_na_enabled() -> bool:
    """What `use_tf32_in_gemm_na` set; True at first."""
    return TF32.value


def enable_gemm_na() -> bool:
    """Deprecated: `use_gemm_na(True)`. Returns the new state."""
    return _turn(GEMM, True, "enable_gemm_na", "use_gemm_na(True)")


def disable_gemm_na() -> bool:
    """Deprecated: `use_gemm_na(False)`. Returns the new state."""
    return _turn(GEMM, False, "disable_gemm_na", "use_gemm_na(False)")


def enable_tiled_na() -> bool:
    """Deprecated: `use_tiled_na(True)`. Returns the new state."""
    return _turn(TILED, True, "enable_tiled_na", "use_tiled_na(True)")


def disable_tiled_na() -> bool:
    """Deprecated: `use_tiled_na(False)`. Returns the new state."""
    return _turn(TILED, False, "disable_tiled_na", "use_tiled_na(False)")


def enable_tf32() -> bool:
    """Deprecated: `use_tf32_in_gemm_na(True)`. Returns the new state."""
    return _turn(TF32, True, "enable_tf32", "use_tf32_in_gemm_na(True)")


def disable_tf32() -> bool:
    """Deprecated: `use_tf32_in_gemm_na(False)`. Returns the new state."""
    return _turn(TF32, False, "disable_tf32", "use_tf32_in_gemm_na(False)")


def _turn(flag: Flag, mode: bool, function: str, instead: str) -> bool:
    warnings.warn(f"{function} is deprecated; use {instead}", DeprecationWarning, stacklevel=3)
    flag.value = mode
    say_without_effect(function, THIS_SWITCH, WHY_NOT[flag.name], stacklevel=4)
    return mode


def effects() -> list[Effect]:
    return [
        Effect(name=flag.name, value=flag.value, effect=WHY_NOT[flag.name], works=False) for flag in (GEMM, TILED, TF32)
    ]
