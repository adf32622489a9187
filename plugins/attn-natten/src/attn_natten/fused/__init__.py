"""Fused neighborhood attention: na1d, na2d and na3d, heads-last, by whichever kernel of attn takes the problem.

- `ops.py`: the three calls, as NATTEN writes them.
- `call.py`: what a call does: checks, flattens the axes, asks the core, adds the additional keys.
- `remembered.py`: what was found out of the arguments of earlier calls.
"""

from __future__ import annotations

from .ops import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]
