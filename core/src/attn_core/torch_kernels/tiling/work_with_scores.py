"""What `torch/tiled` does for a problem where something is added to the logits.

Its tiles are others than those of the mask alone, each batch of them makes numbers to add, and where a gradient to
these is wanted, the backward is one of matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...bias import Mask, RelPosTable, Score
from ...cost import Work
from ...problem import Problem
from ..by_rule import AXIS
from .cut import like_of, tiling
from .runs import BACKWARD_BYTES, FORWARD_BYTES, Lanes, Operands, Run, cuts
from .scores import Added, Gradients, Placed, Scores, is_line
from .sequence import Sequence
from .strips import Strips

#: What a pair takes in the backward, as a multiple of one in the forward; and where that is one of matrix products.
BACKWARD_PAIR = 3.0
BACKWARD_PAIR_WITH_GRADIENT = 8.0
#: What a pair takes in the forward where something is added, as a multiple of one where nothing is.
PAIR = 1.25
#: What the calls that copy the operands into strips and back take, in parts; and with them, finding out which tokens
#: are in them, and which of their tiles have one block.
COPIES = 4.0
STRIPS = 30.0
#: What the calls that make one block take, in parts.
BLOCK = 5.0
#: What a number takes that is copied from a line, as a multiple of one by a rule.
LINE = 0.1
#: How many numbers one with a gradient counts for.
WITH_GRADIENT = 2.0


class Counted(NamedTuple):
    """What is done in all batch entries and heads."""

    pairs: float = 0.0  #: visited
    parts: float = 0.0
    copied: float = 0.0  #: rows
    added: float = 0.0  #: numbers that are made

    def plus(self, other: Counted) -> Counted:
        return Counted(*(a + b for a, b in zip(self, other)))


def work_with_scores(problem: Problem) -> Work | None:
    """Pairs, parts, copies and numbers that are made; None where the mask cannot be cut before the call, or what is
    added is no rule: then the pairs that the mask leaves count."""
    bias = problem.bias
    assert bias is not None
    mask = bias.mask
    if (mask is not None and mask.holds_data) or not all(isinstance(score, Score) for score in bias.scores):
        return None
    scores = Scores(bias.scores)  # type: ignore[arg-type]
    once = counted(problem, mask, scores, backward=False)
    _, parts, copied, added = once
    pairs = PAIR * once.pairs
    if problem.needs_backward:
        again = counted(problem, mask, scores, backward=True)
        pair, number = BACKWARD_PAIR, 1.0
        if problem.bias_requires_grad:
            pair, number = BACKWARD_PAIR_WITH_GRADIENT, WITH_GRADIENT
        pairs = (pairs + pair * again.pairs) / (1 + BACKWARD_PAIR)
        parts, copied, added = parts + again.parts, copied + again.copied, added + number * again.added
    each = max(1, problem.batch * problem.num_heads)
    return Work(pairs / each, parts, copied / each, added)


def counted(problem: Problem, mask: Mask | None, scores: Scores, *, backward: bool) -> Counted:
    """What one direction does."""
    operands = _operands(problem, scores, backward)
    found = Counted()
    for part in tiling(mask, operands.query, problem.seqlen_kv, backward, scores).parts:
        if isinstance(part, Strips):
            lanes = list(_of_strips(part, operands))
            rows = sum(len(x.query) * x.query.shape[1] + len(x.key) * x.key.shape[1] for x in lanes)
            found = found.plus(
                Counted(parts=(COPIES + STRIPS) * len(lanes), copied=2.0 * rows * (2 if backward else 1))
            )
        else:
            assert isinstance(part, Sequence)
            lanes = [
                Lanes._make((*views, problem.scale, part.scores_of(operands, entries)))
                for entries, views in part.lanes(operands[:5])
            ]
        for each in lanes:
            for run in part.runs:
                found = found.plus(_of_run(run, each, backward))
    return found


def _operands(problem: Problem, scores: Scores, backward: bool) -> Operands:
    """Of these sizes, without data."""
    one = torch.empty((), dtype=problem.dtype)
    query = one.expand(problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim)
    key = one.expand(problem.batch, problem.num_kv_heads, problem.seqlen_kv, problem.head_dim)
    like = like_of(query)
    gradients = Gradients((), (), like) if backward and problem.bias_requires_grad else None
    added = Added(scores.rules, problem.num_heads, like, gradients, scores.diagonal)
    return Operands(query, key, key, query, query[..., 0], problem.scale, added)


def _of_strips(part: Strips, operands: Operands) -> Iterator[Lanes]:
    for cut, (query, key, *_) in part.cuts(operands):
        scores = part.scores_of(operands, cut)
        assert scores is not None
        strips = prod(cut.counts)
        rows, columns = (tokens.shape[1] for tokens in (scores.q, scores.k))
        of_query, of_key = (
            x.flatten()[:1].expand(strips * x.shape[0] * x.shape[1], n, x.shape[-1])
            for x, n in ((query, rows), (key, columns))
        )
        yield Lanes(of_query, of_key, of_key, of_query, of_query[..., 0], operands.scale, scores)


def _of_run(run: Run, lanes: Lanes, backward: bool) -> Counted:
    scores = lanes.scores
    assert scores is not None
    dim = lanes.query.shape[2] * lanes.query.element_size()
    rows, bound = (run.rows + 2 * run.columns, BACKWARD_BYTES) if backward else (run.rows, FORWARD_BYTES)
    shared = scores.gradients is None and (run.mask is None or isinstance(run.mask, Tensor)) and scores.same_in(run)
    if shared:
        lanes = lanes._replace(scores=None)
    batches = list(cuts(run, lanes, rows * dim, bound))
    pairs = float(len(lanes.query)) * run.rows * run.columns * run.count
    copied = 2.0 * len(lanes.key) * run.columns * run.count if backward else 0.0
    added, blocks = 0.0, 0
    if shared:
        added, blocks = _numbers(run, scores), len(scores.added.rules)
    elif run.mask is not None or scores.nearest(run) is None:
        added = sum(
            _numbers(_tiles(run, tiles), scores if some is None else scores.some(some)) for tiles, some, _ in batches
        )
        blocks = len(scores.added.rules) * len(batches)
    return Counted(pairs, len(batches) + BLOCK * blocks, copied, added)


def _tiles(run: Run, tiles: tuple[int, int] | None) -> Run:
    return run if tiles is None else run._replace(count=tiles[1] - tiles[0])


def _numbers(run: Run, scores: Placed) -> float:
    """How many are made for the block of these tiles, by what each takes."""
    found = 0.0
    for rule in scores.added.rules:
        same = scores.same(rule, run)
        lanes = len(scores.wanted(rule, one_strip=same).h)
        weight = 1.0
        if scores.extents is None and is_line(rule):
            weight = LINE
        elif type(rule) is RelPosTable:
            weight = AXIS * len(rule.extents)
        found += weight * run.rows * run.columns * lanes * (1 if same else run.count)
    return found
