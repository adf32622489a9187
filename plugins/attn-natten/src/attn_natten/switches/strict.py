"""Whether calls are refused that NATTEN 0.17 refused, and this package can take.

Those are even kernel sizes; in fused calls also fewer heads of keys than of queries, float64, and head dims that are no
multiple of 4 (float32) or 8 (float16, bfloat16). Off unless asked for: a test that code still runs with NATTEN 0.17.
"""

from __future__ import annotations

from .effect import Effect
from .flag import Flag

STRICT = Flag("strict_checks")


def use_strict_checks(mode: bool = True) -> None:
    """Refuses what NATTEN 0.17 refused and this package can take, such as even kernel sizes, by its errors.

    The text of this module has the list.

    Raises InputError for a mode that is not a bool.
    """
    STRICT.set(mode, "use_strict_checks")


def are_strict_checks_enabled() -> bool:
    """False until `use_strict_checks()`."""
    return STRICT.value


def effects() -> list[Effect]:
    text = "what NATTEN 0.17 refused is refused" if STRICT.value else "what can be taken is taken"
    return [Effect(name=STRICT.name, value=STRICT.value, effect=text)]
