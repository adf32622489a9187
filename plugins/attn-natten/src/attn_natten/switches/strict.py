"""Whether calls are refused that NATTEN 0.17 refused, and this package can take.

Those are even kernel sizes, and in fused calls float64, head dims that are no multiple of 4 (float32) or 8 (float16,
bfloat16), and forward-mode differentiation. Off unless asked for: a test that code still runs with NATTEN 0.17.
"""

from __future__ import annotations

from .flag import Flag

STRICT = Flag("strict checks")


def use_strict_checks(mode: bool = True) -> None:
    """Refuse what NATTEN 0.17's kernels could not take, by the errors that it raised (see the module's text).

    Raises InputError for a mode that is not a bool.
    """
    STRICT.set(mode, "use_strict_checks")


def are_strict_checks_enabled() -> bool:
    """False until `use_strict_checks()`."""
    return STRICT.value
