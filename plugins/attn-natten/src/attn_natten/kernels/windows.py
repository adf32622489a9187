"""Which biases are neighborhoods of NATTEN, and their parameters as it takes them.

A bias comes normalized: a causal neighborhood of one axis is a Window to the left, one of the whole sequence is Causal
or nothing. NATTEN has these too, as windows on one axis.
"""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import AttnBias, Causal, Neighborhood, Problem, Refusal, Window

#: (extent, kernel_size, stride, dilation, is_causal) of one axis.
Axis = tuple[int, int, int, int, bool]


def axes_of(bias: AttnBias | None, seqlen: int) -> tuple[Axis, ...]:
    """The window on each axis, for a bias that `refusals` lets through, of a sequence of `seqlen` tokens."""
    if isinstance(bias, Neighborhood):
        return bias.axes
    if isinstance(bias, Window):
        assert bias.left is not None  # else it is no neighborhood
        return ((seqlen, bias.left + 1, 1, 1, True),)
    return ((seqlen, seqlen, 1, 1, bias is not None),)


def rank_of(bias: AttnBias | None) -> int:
    """How many axes the tokens have."""
    return len(bias.extents) if isinstance(bias, Neighborhood) else 1


def is_whole(bias: AttnBias | None) -> bool:
    """Whether the window is the whole sequence."""
    return bias is None or isinstance(bias, Causal)


def refusals(problem: Problem) -> Iterator[Refusal]:
    """Why a bias that is declared is no neighborhood of NATTEN, whose windows have two or more keys on every axis."""
    bias = problem.bias
    if isinstance(bias, Neighborhood):
        if 1 in bias.kernel_size:
            yield Refusal("bias", f"takes windows of 2 and more keys on every axis, got {bias!r}")
        return
    if problem.seqlen_q != problem.seqlen_kv:
        lengths = f"seqlen_q={problem.seqlen_q}, seqlen_kv={problem.seqlen_kv}"
        yield Refusal("seqlen_kv", f"takes as many keys as queries, got {lengths}")
    elif problem.seqlen_kv < 2:
        yield Refusal("seqlen_kv", f"takes 2 and more tokens, got {problem.seqlen_kv}")
    if isinstance(bias, Window) and not (bias.right == 0 and bias.left):
        yield Refusal("bias", f"takes of windows those that a causal neighborhood is, Window(left, 0), got {bias!r}")
