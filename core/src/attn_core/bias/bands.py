"""Several bands (Causal, Window) on the same lengths as one: what all of them keep lies between two diagonals, too."""

from __future__ import annotations

import operator

from ..tracing import constant, has_static_value
from .base import Mask, _is_tracing
from .causal import Causal
from .documents import Band, Documents, common_band
from .segments import band_of, mask_of
from .window import Window


def with_one_band(masks: list[Mask], lengths: tuple[int, int]) -> list[Mask]:
    """The same masks, all bound to `lengths` and normalized, with as few bands as say what theirs do.

    Bands of one corner are one, whatever the lengths. Of two corners, one band says it where its limits count from a
    corner: not, say, where only keys before both diagonals are left. Where lengths are symbolic, corners stay apart.
    """
    places = [place for place, mask in enumerate(masks) if type(mask) in (Causal, Window)]
    if len(places) < 2:
        return masks
    bands = _by_corner([band_of(masks[place]) for place in places])  # type: ignore[arg-type]
    if len(bands) > 1 and not (_is_tracing() and not all(map(has_static_value, lengths))):
        both = _common(operator.index(lengths[0]), operator.index(lengths[1]), tuple(bands))
        bands = bands if both is None else [both]
    if len(bands) == len(places):
        return masks
    made = [mask_of(band) for band in bands]
    simple = [mask.at(lengths).normalize() for mask in made if mask is not None]
    left = [mask for place, mask in enumerate(masks) if place not in places]
    return [mask for mask in simple if mask is not None] + left


def _by_corner(bands: list[Band]) -> list[Band]:
    """One band for each corner: there, the smaller limit counts on either side."""
    found: dict[str | None, Band] = {}
    for left, right, corner in bands:
        other = found.get(corner, (None, None, corner))
        found[corner] = _smaller(left, other[0]), _smaller(right, other[1]), corner
    return list(found.values())


def _smaller(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@constant
def _common(seqlen_q: int, seqlen_kv: int, bands: tuple[Band, ...]) -> Band | None:
    """The simplest band that leaves what all leave; None where no band does."""
    return common_band(Documents([0, seqlen_q], [0], [seqlen_kv]), list(bands))
