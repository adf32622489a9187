"""Runs on the operands as they are: on a sequence, or on every n-th token of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from . import runs
from .runs import Grads, Lanes, Run


@dataclass(frozen=True)
class Sequence:
    """A part of a cut mask: `runs` on the tokens `start`, `start + step`, …

    It is for every batch entry, one by one where `apart` (its masks have one lane for each head), or only for `batch`.
    """

    runs: tuple[Run, ...]
    start: int = 0
    step: int = 1
    batch: int | None = None
    apart: bool = False

    def forward(self, operands: Lanes) -> None:
        """Fills in `out` and `lse` of `[batch, heads, seqlen, dim]` operands."""
        for lanes in self._lanes(operands[:5]):
            runs.forward(self.runs, Lanes._make((*lanes, operands.scale)))

    def backward(self, operands: Lanes, grads: Grads) -> None:
        """Adds to the gradients."""
        for lanes in self._lanes((*operands[:5], *grads)):
            runs.backward(self.runs, Lanes._make((*lanes[:5], operands.scale)), Grads._make(lanes[5:]))

    def tables(self) -> int:
        return sum(run.mask.nbytes for run in self.runs if isinstance(run.mask, Tensor))

    def _lanes(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """`[lanes, seqlen, dim]` views: one for all batch entries where their heads lie at even distances."""
        if self.step != 1:
            tensors = tuple(x[:, :, self.start :: self.step] for x in tensors)
        if self.batch is not None:
            yield tuple(x[self.batch] for x in tensors)
        elif tensors[0].shape[0] == 1:
            yield tuple(x[0] for x in tensors)
        elif not self.apart and all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors):
            yield tuple(x.flatten(0, 1) for x in tensors)
        else:
            yield from zip(*tensors)
