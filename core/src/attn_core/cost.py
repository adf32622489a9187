"""Cost: what a kernel takes, as a sum of what it does; the estimate by which kernels are ranked.

The estimate is physical, not a priority, because priorities race. Every part of it is linear in a few quantities of the
problem (tokens, pairs, pairs that the mask leaves), so it is kept as coefficients: `Terms`. They depend on no length,
and so stay constants where a graph is traced with symbolic lengths.

It is linear in its constants, too: `quantities` says what each is multiplied with, `attn calibrate` solves for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .bias import TensorBias

if TYPE_CHECKING:
    from .problem import Problem


class Terms(NamedTuple):
    """Seconds, as coefficients of what they are multiplied with."""

    call: float = 0.0  #: 1
    queries: float = 0.0  #: batch * seqlen_q
    keys: float = 0.0  #: batch * seqlen_kv
    pairs: float = 0.0  #: batch * seqlen_q * seqlen_kv
    left: float = 0.0  #: batch * pairs that the bias leaves
    dense: float = 0.0  #: seqlen_q * seqlen_kv: a mask that is written out once for every batch entry

    def plus(self, other: Terms) -> Terms:
        return Terms(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> Terms:
        return Terms(*(a * factor for a in self))

    def seconds(self, problem: Problem) -> float:
        """The estimate for the lengths of `problem`."""
        each = problem.pairs_left() if self.left else 0.0
        return seconds(self, problem.batch, problem.seqlen_q, problem.seqlen_kv, each)


def seconds(terms: tuple[float, ...], batch: int, seqlen_q: int, seqlen_kv: int, left: float) -> float:
    """The estimate for these lengths, which may be symbolic; `left` pairs remain per batch entry and head."""
    call, per_query, per_key, per_pair, per_left, per_dense = terms
    square = float(seqlen_q) * float(seqlen_kv)
    each = float(seqlen_q) * per_query + float(seqlen_kv) * per_key + square * per_pair + left * per_left
    return call + float(batch) * each + square * per_dense


class Work(NamedTuple):
    """What a kernel does for one problem, where that is neither all pairs nor just those that the bias leaves.

    Of a problem that needs gradients, what it does on average in forward and backward.
    """

    pairs: float  #: that it visits, per batch entry and head
    parts: float = 0.0  #: smaller problems that it runs one after the other, of whatever size
    copied: float = 0.0  #: rows of operands, results or gradients that it copies or adds up, per batch entry and head
    added: float = 0.0  #: numbers that it makes by a rule, to be added to logits; in all


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a kernel on one kind of device.

    The softmax (per pair) and the fixed part (per call) decide as often as the multiplications do.
    """

    call: float  #: fixed, per call
    pair_dim: float = 0.0  #: per (query, key) pair that is visited, and element of head_dim
    pair: float = 0.0  #: per pair that is visited: the softmax
    token_dim: float = 0.0  #: per token, head and element of head_dim: reading and writing the operands
    token: float = 0.0  #: per query and head: starting a block of rows, whatever the head_dim
    mask: float = 0.0  #: per pair, where a dense bias is read
    element: float = 0.0  #: per element of a dense bias of another dtype, whatever the heads: converting it
    part: float = 0.0  #: per part, where the kernel's `work` counts parts
    added: float = 0.0  #: per number that is made to be added to logits, where the kernel's `work` counts these
    backward: float = 2.5  #: a backward costs so many times the forward
    with_backward: Cost | None = None  #: the constants of forward and backward together, in place of such a factor
    threads: int | None = None  #: of the CPU when it was measured; with others, all but `call` and `part` scales
    source: str = "prior"  #: "prior", or on what it was measured

    def terms(self, problem: Problem, *, skips: bool, dense_bias: bool = False, work: Work | None = None) -> Terms:
        """Its coefficients for `problem`; `skips`: pairs that the bias masks are not visited; `work`: what it does
        instead."""
        once = self.with_backward if problem.needs_backward and self.with_backward is not None else self
        terms = Terms()
        for name, quantity in quantities(problem, skips=skips, dense_bias=dense_bias, work=work).items():
            constant = getattr(once, name)
            if constant:
                terms = terms.plus(quantity.times(constant if name in FIXED else constant * once.of_threads(problem)))
        return terms.times(1.0 + self.backward) if problem.needs_backward and once is self else terms

    def of_threads(self, problem: Problem) -> float:
        """By how much work takes longer than with the threads with which it was measured."""
        return self.threads / torch.get_num_threads() if self.threads and problem.device == "cpu" else 1.0


#: Constants of a Cost that do not become less with more threads.
FIXED = frozenset({"call", "part"})


def quantities(
    problem: Problem, *, skips: bool, dense_bias: bool = False, work: Work | None = None
) -> dict[str, Terms]:
    """How often each constant of a Cost is taken for `problem`, by its name, as coefficients of the lengths."""
    dim = (problem.head_dim + problem.head_dim_v) / 2
    tokens = Terms(queries=problem.num_heads * dim, keys=problem.num_kv_heads * dim)
    visited = Terms(left=float(problem.num_heads)) if skips else Terms(pairs=float(problem.num_heads))
    if work is not None:
        visited = _as_share(problem, work.pairs).times(problem.num_heads)
        if problem.seqlen_q:
            tokens = tokens.plus(Terms(queries=problem.num_heads * dim * work.copied / problem.seqlen_q))
    return {
        "call": Terms(call=1.0),
        "pair_dim": visited.times(dim),
        "pair": visited,
        "token_dim": tokens,
        "token": Terms(queries=float(problem.num_heads)),
        "mask": visited if dense_bias else Terms(),
        "element": _elements(problem) if dense_bias else Terms(),
        "part": Terms() if work is None else Terms(call=work.parts),
        "added": Terms() if work is None else Terms(call=work.added),
    }


def _as_share(problem: Problem, pairs: float) -> Terms:
    """So many pairs per batch entry and head, as a multiple of those that the bias leaves: lengths may be stand-ins."""
    left = problem.pairs_left()
    if left:
        return Terms(left=pairs / left)
    square = float(problem.seqlen_q) * float(problem.seqlen_kv)
    return Terms(pairs=pairs / square) if square else Terms()


def _elements(problem: Problem) -> Terms:
    """The elements of the tensors that the bias is, where they are not of the operands' dtype."""
    found = Terms()
    for part in () if problem.bias is None else problem.bias.scores:
        if isinstance(part, TensorBias) and part.tensor.dtype is not problem.dtype:
            batch, heads, rows, columns = (1,) * (4 - part.tensor.ndim) + tuple(part.tensor.shape)
            if rows == problem.seqlen_q and columns == problem.seqlen_kv:  # else broadcast, and hardly any
                found = found.plus(Terms(dense=float(heads)) if batch == 1 else Terms(pairs=float(heads)))
    return found


#: What a kernel without a declared cost is taken for: an unfused implementation, on a slow day. Installing a plugin
#: that says nothing of its speed therefore changes no choice among kernels that do.
UNDECLARED = Cost(call=100e-6, pair_dim=50e-12, pair=5e-9, token_dim=1e-9, mask=2e-9, source="undeclared")
