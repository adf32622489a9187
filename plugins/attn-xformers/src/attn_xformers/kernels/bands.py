"""Causal masks and windows by what they leave beside the diagonal, counted from either corner.

The same band can be said from both: where keys are more than queries by s, the diagonal of the top left lies s keys
before that of the bottom right. xFormers has a class for some bands from one corner and for some from the other.

    3 queries, 5 keys, s = 2     from the top left        from the bottom right
    ██···                        left None, right 1       left None, right -1: no class has that
    ███··
    ████·
"""

from __future__ import annotations

from attn_core import Causal, Window
from attn_core.bias.segments import band_of

#: (keys before the diagonal, keys behind it); None: no limit.
Sides = tuple[int | None, int | None]


def from_both_corners(bias: Causal | Window, seqlen_q: int, seqlen_kv: int) -> tuple[Sides, Sides]:
    """What `bias` leaves beside the diagonal of the top left, and beside that of the bottom right."""
    left, right, corner = band_of(bias)
    shift = seqlen_kv - seqlen_q
    if corner != "bottom-right":
        return (left, right), moved(left, right, shift)
    return moved(left, right, -shift), (left, right)


def moved(left: int | None, right: int | None, shift: int) -> Sides:
    """The same band beside a diagonal that lies `shift` keys further."""
    return None if left is None else left + shift, None if right is None else right - shift


def leaves_a_row_empty(sides: Sides, seqlen_q: int, seqlen_kv: int) -> bool:
    """Whether some query sees no key of a band beside the diagonal of the bottom right.

    Queries see what the band leaves of keys that move with them, so that the first query or the last one tells.
    """
    if seqlen_q == 0:
        return False
    left, right = sides
    first, last = seqlen_kv - seqlen_q, seqlen_kv - 1
    sees_none_before = right is not None and first + right < 0
    sees_none_behind = left is not None and last - left >= seqlen_kv
    return seqlen_kv == 0 or sees_none_before or sees_none_behind
