"""Where the diagonal of a causal mask or a window starts when there are fewer queries than keys, or more.

top-left, 3 x 5      bottom-right, 3 x 5
█····                ███··
██···                ████·
███··                █████
"""

from __future__ import annotations

from typing import Literal

from ..errors import InputError

Corner = Literal["top-left", "bottom-right"]
CORNERS: tuple[Corner, ...] = ("top-left", "bottom-right")


def check_corner(kind: str, corner: str | None) -> None:
    if corner is not None and corner not in CORNERS:
        raise InputError(f'{kind}: corner must be "top-left" or "bottom-right", got {corner!r}')


def check_corner_is_decided(kind: str, corner: str | None, seqlen_q: int, seqlen_kv: int) -> None:
    """No corner is fine where both agree, that is, where the lengths are equal."""
    if corner is None and seqlen_q != seqlen_kv:
        raise InputError(
            f"{kind}() has no corner, and seqlen_q={seqlen_q} differs from seqlen_kv={seqlen_kv}:"
            f' say corner="top-left" (query 0 sees key 0, as in torch)'
            f' or corner="bottom-right" (the last query sees the last key, as in FlashAttention)'
        )


def offset(corner: str | None, seqlen_q: int, seqlen_kv: int) -> int:
    """The key on the diagonal of query 0."""
    return seqlen_kv - seqlen_q if corner == "bottom-right" else 0


def clipped_pairs(seqlen_q: float, seqlen_kv: float, first: float) -> float:
    """How many pairs lie on or below a diagonal that starts at key `first`.

    The sum of clamp(first + i + 1, 0, seqlen_kv) over the queries i. Closed form, and plain
    arithmetic, so that it works on symbolic lengths as well.
    """

    def ramp(n: float) -> float:  # the sum of max(x, 0) over the integers x <= n
        n = max(n, 0.0)
        return n * (n + 1.0) / 2.0

    last = first + seqlen_q  # clamp's argument for the last query
    below = ramp(last) - ramp(first)
    above = ramp(last - seqlen_kv) - ramp(first - seqlen_kv)
    return below - above
