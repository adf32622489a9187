"""What `torch/tiled` does for a problem: the pairs of its tiles, and how many dense problems it runs.

The mask is cut for that as it is for a call; where the kernel is then chosen, its first call finds the tables made.
"""

from __future__ import annotations

from math import ceil, prod

import torch

from ...bias import Intersection, Mask
from ...bias.zero_padded import ZeroPadded
from ...cost import Work
from ...problem import Problem
from .blocks import ROWS
from .cut import WIDE, tiling_of, whole
from .runs import BACKWARD_BYTES, FORWARD_BYTES, Run
from .strips import Strips
from .work_with_scores import BACKWARD_PAIR, COPIES, work_with_scores

_modes_of_dispatch = torch._C._len_torch_dispatch_stack

#: What a pair takes where its mask is evaluated in the call, as a multiple of one whose mask was made before.
EVALUATED = 1.35
#: What cutting a block of queries in the call, and running it, takes in parts.
BLOCK = 2.0


def work(problem: Problem) -> Work | None:
    """Pairs, parts and copies; None where a mask cannot be cut before the call: then the pairs that it leaves count."""
    mask = problem.bias
    if problem.device != "cpu" or _modes_of_dispatch():
        return None
    if mask is not None and mask.scores:
        return work_with_scores(problem)
    assert mask is None or isinstance(mask, Mask)
    if mask is not None and mask.holds_data:
        return _at_the_call(problem, mask) if _was_padded(mask) else None
    once = _of(problem, mask, backward=False)
    if not problem.needs_backward:
        return once
    again = _of(problem, mask, backward=True)
    pairs = (once.pairs + BACKWARD_PAIR * again.pairs) / (1 + BACKWARD_PAIR)
    return Work(pairs, once.parts + again.parts, once.copied + again.copied)


def _was_padded(mask: Mask) -> bool:
    return isinstance(mask, ZeroPadded) or (isinstance(mask, Intersection) and any(map(_was_padded, mask.parts)))


def _at_the_call(problem: Problem, mask: Mask) -> Work:
    """Of a mask with lengths of its own for each batch entry: each is cut anew at each call, in either direction."""
    blocks = mask.batch_and_heads[0] * ceil(problem.seqlen_q / ROWS)
    return Work(EVALUATED * mask.pairs(), BLOCK * blocks * (2 if problem.needs_backward else 1))


def _of(problem: Problem, mask: Mask | None, *, backward: bool) -> Work:
    like = torch.empty(0, dtype=problem.dtype)
    tiling = whole(problem.seqlen_q, problem.seqlen_kv) if mask is None else tiling_of(mask, like, backward)
    row = problem.head_dim * WIDE.get(problem.dtype, problem.dtype).itemsize
    pairs, parts, copied = 0.0, 0.0, 0.0
    for part in tiling.parts:
        strips = 1
        if isinstance(part, Strips):
            strips = prod(part.counts)
            parts += COPIES
            copied += _into_strips(part, backward)
        lanes = strips * problem.num_heads * problem.batch
        for run in part.runs:  # type: ignore[attr-defined]
            rows, bound = (run.rows + 2 * run.columns, BACKWARD_BYTES) if backward else (run.rows, FORWARD_BYTES)
            batches = ceil(run.count / max(1, bound // max(1, rows * row * lanes)))
            parts += batches
            visited = strips * _pairs(run)
            if backward:
                visited *= _uneven(lanes * run.count / batches)
                # Gradients of the keys of every tile are added up.
                copied += strips * 2 * run.count * run.columns
            pairs += visited
    return Work(pairs, parts, copied)


def _into_strips(part: Strips, backward: bool) -> float:
    """Rows that are copied into strips: query and out, key and value; in the backward, their gradients as well."""
    queries = prod(count * axis[0].rows for count, axis in zip(part.counts, part.across))
    keys = prod(count * axis[0].columns for count, axis in zip(part.counts, part.across))
    extent = part.extents[0] / part.steps[0]
    return (2 if backward else 1) * extent * 2 * (queries + keys)


def _uneven(lanes: float) -> float:
    """By how much longer it takes that threads share whole lanes: three by two of them take as long as four."""
    threads = torch.get_num_threads()
    return ceil(lanes / threads) * threads / lanes if lanes else 1.0


def _pairs(run: Run) -> float:
    square = float(run.rows * run.columns * run.count)
    if not run.causal:
        return square
    rows = 256 if run.rows >= 768 else 64 if run.rows >= 192 else 32  # of a block of the dense kernel
    kept = run.rows * min(run.columns, (run.rows + min(rows, run.rows)) / 2) * run.count
    return min(square, kept)
