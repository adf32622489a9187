"""Cost: what a kernel takes, as a sum of what it does; the estimate by which kernels are ranked.

The estimate is physical, not a priority, because priorities race. Every part of it is linear in a few quantities of the
problem (tokens, pairs, pairs that the mask leaves), so it is kept as coefficients: `Terms`. They depend on no length,
and so stay constants where a graph is traced with symbolic lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a kernel on one kind of device.

    The softmax (per pair) and the fixed part (per call) decide as often as the multiplications do.
    """

    call: float  #: fixed, per call
    pair_dim: float = 0.0  #: per (query, key) pair that is visited, and element of head_dim
    pair: float = 0.0  #: per pair that is visited: the softmax
    token_dim: float = 0.0  #: per token and element of head_dim: reading and writing the operands
    mask: float = 0.0  #: per pair, where a dense bias is read
    backward: float = 2.5  #: a backward costs so many times the forward
    source: str = "prior"  #: "prior", or on what it was measured

    def terms(self, problem: Problem, *, skips: bool, dense_bias: bool) -> Terms:
        """Its coefficients for `problem`; `skips`: pairs that the bias masks are not visited."""
        dim = (problem.head_dim + problem.head_dim_v) / 2
        per_pair = problem.num_heads * (self.pair_dim * dim + self.pair + (self.mask if dense_bias else 0.0))
        terms = Terms(
            call=self.call,
            queries=problem.num_heads * dim * self.token_dim,
            keys=problem.num_kv_heads * dim * self.token_dim,
            pairs=0.0 if skips else per_pair,
            left=per_pair if skips else 0.0,
        )
        return terms.times(1.0 + self.backward) if problem.needs_backward else terms


#: What a kernel without a declared cost is taken for: an unfused implementation, on a slow day. Installing a plugin
#: that says nothing of its speed therefore changes no choice among kernels that do.
UNDECLARED = Cost(call=100e-6, pair_dim=50e-12, pair=5e-9, token_dim=1e-9, mask=2e-9, source="undeclared")
