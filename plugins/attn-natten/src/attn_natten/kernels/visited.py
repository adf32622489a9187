"""How many pairs the tiles visit: a tile of queries reads whole tiles of keys, those that any of its windows meets."""

from __future__ import annotations

from math import prod

from attn_core import Problem, Work

from .windows import Axis, axes_of, is_whole

#: By rank, the sides of a tile, which NATTEN chooses so that it has 64 tokens unless told otherwise.
TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def work(problem: Problem) -> Work:
    """The pairs in tiles that are visited, with tiles of 64 queries and 64 keys."""
    axes = axes_of(problem.bias, problem.seqlen_q)
    return Work(prod(_pairs(axis, side) for axis, side in zip(axes, TILE[len(axes)])))


def _pairs(axis: Axis, side: int) -> float:
    """Of one axis: queries in whole tiles, times the keys in the tiles that such a tile of queries meets on average."""
    extent, kernel, _, dilation, _ = axis
    points = -(-extent // dilation)  # on each of the `dilation` lines
    tiles = -(-points // side)
    met = min(kernel + side - 2 + side, tiles * side)  # a run of kernel + side - 1 keys, anywhere between tiles
    return float(dilation * tiles * side * met)


def work_of_flex(problem: Problem) -> Work:
    """Every pair, and beside them the mask of a neighborhood, which is made from its rule at every call."""
    pairs = float(problem.seqlen_q) * float(problem.seqlen_kv)
    return Work(pairs, added=0.0 if is_whole(problem.bias) else pairs)
