"""Runs on the operands as they are: on a sequence, or on every n-th token of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from . import runs
from .runs import Grads, Lanes, Operands, Run
from .scores import Placed


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

    def forward(self, operands: Operands) -> None:
        """Fills in `out` and `lse` of `[batch, heads, seqlen, dim]` operands."""
        for entries, lanes in self.lanes(operands[:5]):
            runs.forward(self.runs, Lanes._make((*lanes, operands.scale, self.scores_of(operands, entries))))

    def backward(self, operands: Operands, grads: Grads) -> None:
        """Adds to the gradients."""
        for entries, lanes in self.lanes((*operands[:5], *grads)):
            scores = self.scores_of(operands, entries)
            runs.backward(self.runs, Lanes._make((*lanes[:5], operands.scale, scores)), Grads._make(lanes[5:]))

    def tables(self) -> int:
        return sum(run.mask.nbytes for run in self.runs if isinstance(run.mask, Tensor))

    def scores_of(self, operands: Operands, entries: range) -> Placed | None:
        if operands.scores is None:
            return None
        seqlen_q, seqlen_kv = operands.query.shape[2], operands.key.shape[2]
        return operands.scores.on_sequence(seqlen_q, seqlen_kv, self.start, self.step, entries)

    def lanes(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[range, tuple[Tensor, ...]]]:
        """(batch entries, `[lanes, seqlen, dim]` views): one for all where their heads lie at even distances."""
        batch = tensors[0].shape[0]
        if self.step != 1:
            tensors = tuple(x[:, :, self.start :: self.step] for x in tensors)
        if self.batch is not None:
            yield range(self.batch, self.batch + 1), tuple(x[self.batch] for x in tensors)
        elif batch == 1:
            yield range(1), tuple(x[0] for x in tensors)
        elif not self.apart and all(x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors):
            yield range(batch), tuple(x.flatten(0, 1) for x in tensors)
        else:
            for entry, lanes in enumerate(zip(*tensors)):
                yield range(entry, entry + 1), lanes
