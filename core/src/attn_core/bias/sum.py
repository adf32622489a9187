"""Sum: masks and scores at once, as `a + b` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputTypeError
from .base import MASKED, AttnBias, Mask
from .joint import Joint


@dataclass(frozen=True, repr=False, eq=False)
class Sum(Joint):
    """What its parts add is summed; what one of them masks is masked: `Causal() + ALiBi(8)`.

    Made by `+`, which flattens and joins all masks to one, the last part: so a function of the logit never sees -inf.
    Raises InputTypeError for anything but biases, InputError for fewer than two, or for parts that were made for other
    lengths, batches, heads or devices.
    """

    parts: tuple[AttnBias, ...]
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, AttnBias) or isinstance(part, Sum):
                raise InputTypeError(f"Sum: takes biases that are no sums themselves, got {type(part).__name__}")
        if any(isinstance(part, Mask) for part in self.parts[:-1]):
            raise InputTypeError("Sum: takes one mask, as the last part; `+` joins them")
        self.check_parts()

    def __repr__(self) -> str:
        return " + ".join(
            f"({part!r})" if " " in repr(part) and " & " in repr(part) else repr(part) for part in self.parts
        )

    @property
    def mask(self) -> Mask | None:
        return self.parts[-1].mask

    @property
    def scores(self) -> tuple[AttnBias, ...]:
        return self.parts if self.mask is None else self.parts[:-1]

    @property
    def has_dense_form(self) -> bool:
        return all(part.has_dense_form for part in self.parts)

    def score(self, logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for part in self.parts:
            logit = part.score(logit, b, h, q, k)
        return logit

    def apply(self, logits: Tensor) -> Tensor:
        for part in self.parts:
            logits = part.apply(logits)
        return logits

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """Floating tensor, added to the logits, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`."""
        return self.dense(device, torch.float32)

    def dense(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        kept: Tensor | None = None
        total: Tensor | None = None
        for part in self.parts:
            own = part.dense(device, dtype)
            if own.dtype is torch.bool:
                kept = own if kept is None else kept & own
            else:
                total = own if total is None else total + own
        if total is None:
            assert kept is not None  # there are parts
            return kept
        return total if kept is None else torch.where(kept, total, MASKED)

    def pairs(self) -> float:
        return super().pairs() if self.mask is None else self.mask.pairs()

    def normalize(self) -> AttnBias | None:
        parts = [part.normalize() for part in self.parts]
        if all(new is old for new, old in zip(parts, self.parts)):
            return self
        left = [part for part in parts if part is not None]
        if len(left) < 2:
            return left[0] if left else None
        return Sum(tuple(left), self.lengths)


def added_up(one: AttnBias, other: AttnBias | Tensor) -> AttnBias:
    """`one + other`: flat, all masks joined behind the rest; bound where one of them is.

    Raises InputTypeError for what is no bias.
    """
    from .convert import as_bias  # which knows every kind

    parts: list[AttnBias] = []
    for bias in (one, as_bias(other)):
        if bias is not None:
            parts += bias.parts if isinstance(bias, Sum) else [bias]
    scores = [part for part in parts if not isinstance(part, Mask)]
    mask: Mask | None = None
    for part in parts:
        if isinstance(part, Mask):
            mask = part if mask is None else mask & part
    if not scores:
        assert mask is not None  # `one` is a bias
        return mask
    joined = (*scores, mask) if mask is not None else tuple(scores)
    return Sum(joined).bound_by_parts() if len(joined) > 1 else joined[0]
