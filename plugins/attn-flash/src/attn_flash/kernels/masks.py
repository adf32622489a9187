"""Biases in FlashAttention's terms: a window on the bottom-right diagonal, documents, a cache, slopes.

A bias comes normalized, and a declaration has let it through: a mask of a known kind, or a sum of it and ALiBi. All
that is left to refuse is what the kind may say and FlashAttention has no words for. What FlashAttention 2 makes of its
windows is the same in torch's own copy of it, and known by the core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from attn_core import ALiBi, AttnBias, Cached, Causal, KeyPadding, Mask, Paged, Problem, Refusal, Segments, Window
from attn_core.bias.base import known
from attn_core.torch_kernels import flash_limits


class Asked(NamedTuple):
    """What a bias asks of FlashAttention."""

    left: int | None = None  #: keys that are seen before the diagonal; None: all
    right: int | None = None  #: and behind it
    segments: Segments | None = None
    cache: Cached | KeyPadding | Paged | None = None
    alibi: ALiBi | None = None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0

    @property
    def is_window(self) -> bool:
        """Whether it has limits, and is not causal alone."""
        return not self.causal and (self.left is not None or self.right is not None)


def asked(bias: AttnBias | None) -> Asked:
    """What is asked of it, for a bias that is declared."""
    if bias is None:
        return Asked()
    mask = mask_of(bias)
    within = inner(mask)
    left, right = (within.left, within.right) if isinstance(within, Window) else (None, None)
    return Asked(
        left,
        0 if isinstance(within, Causal) else right,
        mask if isinstance(mask, Segments) else None,
        mask if isinstance(mask, (Cached, KeyPadding, Paged)) else None,
        next((part for part in bias.scores if isinstance(part, ALiBi)), None),
    )


def mask_of(bias: AttnBias | None) -> Mask | None:
    """The part of it that is a mask; what lies within documents from the bottom right, where it can be said so."""
    mask = None if bias is None else bias.mask
    if isinstance(mask, Segments):
        return mask.from_bottom_right() or mask
    return mask


def inner(mask: Mask | None) -> Mask | None:
    """The causal mask or window in each document or sequence, or the mask itself; None for all keys."""
    if isinstance(mask, (Segments, Cached, Paged)):
        return mask.within
    return None if isinstance(mask, KeyPadding) else mask


def refusals(problem: Problem) -> Iterator[Refusal]:
    """Of every generation."""
    if problem.scale <= 0:  # they mask before they scale: 0 * -inf is NaN, and a negative scale turns -inf into +inf
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale}")
    mask = mask_of(problem.bias)
    if isinstance(mask, Segments):
        yield from flash_limits.of_documents(mask)
        yield from flash_limits.of_tokens(problem)
    within = inner(mask)
    if isinstance(mask, (Cached, Paged)) and isinstance(within, (Causal, Window)) and within.corner == "top-left":
        text = "takes masks from the bottom right of each sequence, its last query on its last key"
        yield Refusal("bias", f"{text}; got within={within!r}")


def refusals_of_corners(problem: Problem) -> Iterator[Refusal]:
    """Of the generations whose windows have no trap: where they start in a dense call."""
    mask = None if problem.bias is None else problem.bias.mask
    if isinstance(mask, Window) and mask.corner == "top-left" and not known(problem.seqlen_q == problem.seqlen_kv):
        yield Refusal("bias", f"takes windows from the bottom right, got {mask!r}")


def refusals_of_alibi(problem: Problem) -> Iterator[Refusal]:
    """Of the generation that has ALiBi: its distance is counted from the bottom right of each sequence."""
    scores, mask = flash_limits.parts_of(problem.bias)
    slopes = [part for part in scores if isinstance(part, ALiBi)]
    if len(slopes) > 1:
        yield Refusal("bias", f"takes one ALiBi, got {problem.bias!r}")
    elif slopes and isinstance(mask, (Cached, KeyPadding, Paged)):
        text = "takes ALiBi without a cache or padding, as it would count from each sequence's own last key"
        yield Refusal("bias", f"{text}; got {problem.bias!r}")
    elif slopes:
        yield from flash_limits.of_alibi(slopes[0], mask, problem.seqlen_q, problem.seqlen_kv)


def refusals_of_gaps(problem: Problem, *, in_forward: bool) -> Iterator[Refusal]:
    """Documents between whose keys lie others; `in_forward`: not even the forward takes them."""
    mask = None if problem.bias is None else problem.bias.mask
    if isinstance(mask, Segments) and mask.has_gaps and (in_forward or problem.needs_backward):
        text = f"takes documents whose keys follow each other{'' if in_forward else ' in the backward'}, got {mask!r}"
        yield Refusal("bias" if in_forward else "backward.biases", text)
