"""The numbers that a kernel makes which asks the rule of every score for every pair: they can outweigh all the rest.

What one takes, `Cost.added` of these kernels, is an estimate: from ALiBi and tables of one to three axes, forward, on a
machine that was busy. That of the reference's backward is three times its forward, and was not measured.
"""

from __future__ import annotations

from ..bias import RelPosTable, Score
from ..cost import Work
from ..problem import Problem

#: What finding a table's entry takes for each axis, as a multiple of a plain rule such as ALiBi's.
AXIS = 2.0


def work(problem: Problem) -> Work | None:
    """All pairs, and the numbers that are added to them by a rule; None where there are none."""
    found = 0.0
    for part in () if problem.bias is None else problem.bias.scores:
        if isinstance(part, Score):
            batch, heads = part.batch_and_heads
            found += batch * heads * (AXIS * len(part.extents) if isinstance(part, RelPosTable) else 1.0)
    if not found:
        return None
    pairs = float(problem.seqlen_q) * float(problem.seqlen_kv)
    return Work(pairs, added=found * pairs)
