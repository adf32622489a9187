"""The autotuner: times the configurations of a kernel for each new problem, and keeps the fastest for its next calls.

    attn_natten.use_autotuner(forward_pass=True, backward_pass=True)
    out = attn_natten.na2d(query, key, value, kernel_size=7)  # slow the first time, tuned from then on

- `settings.py`: the switch, and what it says.
- `search.py`: which problem a call is, whether it may be tuned, and the search.
- `timing.py`: how a configuration is timed.
- `cache.py`: what was found, of so many problems at most.
- `families.py`: which kernels have configurations; `tiles.py` those of `torch/tiled`.
"""

from __future__ import annotations

from .search import clear_autotuner_cache, tuned_for
from .settings import (
    disable_autotuner,
    effects,
    is_autotuner_enabled,
    is_autotuner_enabled_for_backward,
    is_autotuner_enabled_for_forward,
    is_autotuner_thorough_for_backward,
    is_autotuner_thorough_for_forward,
    use_autotuner,
)

__all__ = [
    "clear_autotuner_cache",
    "disable_autotuner",
    "effects",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "tuned_for",
    "use_autotuner",
]
