"""`attn profile-na`: how long a neighborhood attention takes here, by which kernel, and in which configuration.

    best = attn_natten.profile.load("profile-na.json")  # saved by attn profile-na --optimize
    with best.applied():
        out = attn_natten.na2d(query, key, value, kernel_size=7)

- `case.py`: what is profiled, without data.
- `measure.py`: seconds of a kernel in a configuration.
- `optimize.py`: the search for the best of all kernels.
- `result.py`: what it found; saved and loaded.
- `command.py`, `flags.py`: the command line.
"""

from __future__ import annotations

from .case import Case
from .optimize import optimize
from .result import Result, load

__all__ = ["Case", "Result", "load", "optimize"]
