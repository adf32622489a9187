"""`fwd` and `bwd`: sequences of one length, `[batch, seqlen, num_heads, head_dim]`."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from .arithmetic import backward, forward
from .extension import check, check_launch, check_shape, extension
from .fa2_parts import (
    check_operands,
    check_problem,
    kept_of,
    mark,
    rng_state,
    room_for_weights,
    rounded_up,
    rules,
    slopes_of,
    written_into,
)
from .sequences import garbage


@extension
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Generator | None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of `[batch, seqlen, num_heads, head_dim]`."""
    check_operands(q, k, v)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_k = k.shape[1:3]
    check_problem(batch, head_dim, heads, heads_k, softcap, p_dropout)
    check(head_dim % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    check_shape("k", k, batch, seqlen_k, heads_k, head_dim)
    check_shape("v", v, batch, seqlen_k, heads_k, head_dim)
    out = written_into(out_, q)
    lse = garbage(batch, heads, seqlen_q, dtype=torch.float32)
    marked = room_for_weights(return_softmax, p_dropout, batch, heads, seqlen_q, seqlen_k, q.dtype)
    state = rng_state(p_dropout, gen_)
    causal = is_causal and (seqlen_q > 1 or alibi_slopes_ is not None)
    ruled = rules(softmax_scale, softcap, p_dropout, causal, window_size_left, window_size_right, seqlen_k)
    slopes = slopes_of(alibi_slopes_, batch, heads)
    if seqlen_k == 0:
        out.zero_()
        lse.fill_(math.inf)
        return [out, lse, marked, state]
    check_launch(seqlen_q)
    for b in range(batch):
        kept = kept_of(state, b, (heads, seqlen_q, seqlen_k), p_dropout)
        out[b], lse[b], weights = forward(q[b], k[b], v[b], ruled(slopes, b), kept)
        mark(marked, b, weights, kept)
    return [out, lse, marked, state]


@extension
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Generator | None,
    rng_state_: Tensor | None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of `[batch, seqlen, num_heads, head_dim]`."""
    check_operands(q, k, v, out=out, dout=dout)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_k = k.shape[1:3]
    check_problem(batch, head_dim, heads, heads_k, softcap, p_dropout)
    check(head_dim % 8 == 0, "head_size should be a multiple of 8")
    for name, x in {"k": k, "v": v}.items():
        check_shape(name, x, batch, seqlen_k, heads_k, head_dim)
    for name, x in {"out": out, "dout": dout}.items():
        check_shape(name, x, batch, seqlen_q, heads, head_dim)
    dq, dk, dv = written_into(dq_, q), written_into(dk_, k), written_into(dv_, v)
    ruled = rules(softmax_scale, softcap, p_dropout, is_causal, window_size_left, window_size_right, seqlen_k)
    slopes = slopes_of(alibi_slopes_, batch, heads)
    unused = garbage(batch, heads, rounded_up(seqlen_q), dtype=torch.float32)
    if seqlen_q == 0:
        dk.zero_()
        dv.zero_()
        return [dq, dk, dv, unused]
    check_launch(seqlen_k if not deterministic else 1)
    for b in range(batch):
        kept = kept_of(rng_state_, b, (heads, seqlen_q, seqlen_k), p_dropout)
        dq[b], dk[b], dv[b] = backward(dout[b], q[b], k[b], v[b], out[b], softmax_lse[b], ruled(slopes, b), kept)
    return [dq, dk, dv, unused]
