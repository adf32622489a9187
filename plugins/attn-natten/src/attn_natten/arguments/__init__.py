"""The door of the front end: what is passed in, checked once, in the caller's words.

Every error names the argument, what is accepted and what was given. Parameters that have a value on each axis come out
as tuples. Where a call is legal, what NATTEN 0.17's kernels could not take and those here can is refused only after
`use_strict_checks()`.
"""

from __future__ import annotations

from .heads_first import check_additional_heads_first, check_heads_first, check_weights
from .heads_last import check_additional, check_heads_last
from .operands import has_tangents
from .parameters import SPATIAL, CausalPerAxis, PerAxis, causal_alias, neighborhood, of_each_axis, window
from .rpb import check_rpb, check_rpb_has_no_tangents, check_rpb_is_possible

__all__ = [
    "SPATIAL",
    "CausalPerAxis",
    "PerAxis",
    "causal_alias",
    "check_additional",
    "check_additional_heads_first",
    "check_heads_first",
    "check_heads_last",
    "check_rpb",
    "check_rpb_has_no_tangents",
    "check_rpb_is_possible",
    "check_weights",
    "has_tangents",
    "neighborhood",
    "of_each_axis",
    "window",
]
