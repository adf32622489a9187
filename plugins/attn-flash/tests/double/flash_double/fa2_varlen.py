"""`varlen_fwd` and `varlen_bwd`: sequences packed behind one another, `[total, num_heads, head_dim]`; keys in pages."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from .arithmetic import backward, forward
from .extension import check, check_int32, check_launch, check_shape, extension
from .fa2_parts import (
    check_operands,
    check_pages,
    check_problem,
    kept_of,
    mark,
    rng_state,
    room_for_weights,
    rules,
    slopes_of,
    written_into,
)
from .sequences import at, garbage, in_pages, lse_at


@extension
def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Generator | None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of `[total, num_heads, head_dim]`; LSE is `[num_heads, total_q]`."""
    check_operands(q, k, v)
    check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    total_q, heads, head_dim = q.shape
    heads_k = k.shape[-2]
    batch = cu_seqlens_q.numel() - 1
    check_problem(batch, head_dim, heads, heads_k, softcap, p_dropout)
    check(head_dim % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    if block_table_ is None:
        check_shape("k", k, k.shape[0], heads_k, head_dim)
        check_shape("v", v, k.shape[0], heads_k, head_dim)
    else:
        check_pages(k, v, block_table_, batch, heads_k, head_dim)
    check_shape("cu_seqlens_k", cu_seqlens_k, batch + 1)
    if seqused_k is not None:
        check_int32(seqused_k=seqused_k)
        check_shape("seqused_k", seqused_k, batch)
    skipped = [0] * batch
    if leftpad_k_ is not None:
        check(block_table_ is None, "We don't support Paged KV and leftpad_k running at the same time yet")
        check_int32(leftpad_k=leftpad_k_)
        skipped = leftpad_k_.tolist()

    causal = is_causal and (max_seqlen_q > 1 or alibi_slopes_ is not None)
    left, right = window_size_left, 0 if causal else window_size_right
    one_query_each = max_seqlen_q == 1 and heads > heads_k and left < 0 and right < 0
    one_query_each = one_query_each and p_dropout == 0 and alibi_slopes_ is None
    check(
        not one_query_each or total_q == batch,
        f"shape '[{batch}, {heads_k}, {heads // heads_k}, {head_dim}]' is invalid for input of size {q.numel()}",
    )
    offsets_q = list(range(batch + 1)) if one_query_each else cu_seqlens_q.tolist()
    offsets_k = cu_seqlens_k.tolist()

    out = written_into(out_, q)
    lse = garbage(heads, total_q, dtype=torch.float32)
    marked = room_for_weights(return_softmax, p_dropout, batch, heads, max_seqlen_q, max_seqlen_k, q.dtype)
    if zero_tensors:
        out.zero_()
        lse.fill_(-math.inf)
    state = rng_state(p_dropout, gen_)
    if block_table_ is not None:
        p_dropout = 0.0
    ruled = rules(softmax_scale, softcap, p_dropout, causal, left, right, max_seqlen_k)
    slopes = slopes_of(alibi_slopes_, batch, heads)
    if max_seqlen_k == 0:
        out.zero_()
        lse.fill_(math.inf)
        return [out, lse, marked, state]
    check_launch(max_seqlen_q)
    for b in range(batch):
        seqlen_q = offsets_q[b + 1] - offsets_q[b]
        seqlen_k = (offsets_k[b + 1] - offsets_k[b] if seqused_k is None else int(seqused_k[b])) - skipped[b]
        queries = at(b, offsets_q, seqlen_q)
        if block_table_ is None:
            keys = at(b, offsets_k, seqlen_k, skipped[b])
        else:
            keys = in_pages(k, block_table_, b, 0, seqlen_k)
        kept = kept_of(state, b, (heads, seqlen_q, seqlen_k), p_dropout)
        made, made_lse, weights = forward(q[queries], k[keys], v[keys], ruled(slopes, b), kept)
        reached = at(b, offsets_q, min(seqlen_q, max_seqlen_q))  # further rows are not on the grid
        out[reached], lse[lse_at(reached)] = made[:max_seqlen_q], made_lse[:, :max_seqlen_q]
        mark(marked, b, weights, kept)
    return [out, lse, marked, state]


@extension
def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Generator | None,
    rng_state_: Tensor | None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of `[total, num_heads, head_dim]`."""
    check_operands(q, k, v, out=out, dout=dout)
    check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    total_q, heads, head_dim = q.shape
    total_k, heads_k = k.shape[:2]
    batch = cu_seqlens_q.numel() - 1
    check_problem(batch, head_dim, heads, heads_k, softcap, p_dropout)
    check(head_dim % 8 == 0, "head_size should be a multiple of 8")
    for name, x in {"k": k, "v": v}.items():
        check_shape(name, x, total_k, heads_k, head_dim)
    for name, x in {"out": out, "dout": dout}.items():
        check_shape(name, x, total_q, heads, head_dim)
    check_shape("cu_seqlens_k", cu_seqlens_k, batch + 1)
    dq, dk, dv = written_into(dq_, q), written_into(dk_, k), written_into(dv_, v)
    if zero_tensors:
        for grad in (dq, dk, dv):
            grad.zero_()
    ruled = rules(softmax_scale, softcap, p_dropout, is_causal, window_size_left, window_size_right, max_seqlen_k)
    slopes = slopes_of(alibi_slopes_, batch, heads)
    unused = garbage(heads, total_q + 128 * batch, dtype=torch.float32)
    if max_seqlen_q == 0:
        dk.zero_()
        dv.zero_()
        return [dq, dk, dv, unused]
    check_launch(max_seqlen_k if not deterministic else 1)
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(batch):
        queries = at(b, offsets_q, offsets_q[b + 1] - offsets_q[b])
        keys = at(b, offsets_k, offsets_k[b + 1] - offsets_k[b])
        lse = softmax_lse[lse_at(queries)]
        kept = kept_of(rng_state_, b, (*lse.shape, k[keys].shape[0]), p_dropout)
        dq[queries], dk[keys], dv[keys] = backward(
            dout[queries], q[queries], k[keys], v[keys], out[queries], lse, ruled(slopes, b), kept
        )
    return [dq, dk, dv, unused]
