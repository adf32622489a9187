"""FlashAttention-2's functions, by their published signatures, over the double of its extension.

As in the real package: head_dim is padded to a multiple of 8, with the scale of the unpadded one; the output comes
alone, or as one of three with the LSE; no gradient flows from the LSE. Other than there, these are no ops of torch:
what traces them (torch.compile) traces into the double, and asks it for lengths that are not known yet.
"""

from __future__ import annotations

from typing import Any

import flash_attn_2_cuda
import torch
from torch import Tensor
from torch.nn.functional import pad


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`[batch, seqlen, num_heads, head_dim]`; LSE is `[batch, num_heads, seqlen]`."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _Attend.apply(q, k, v, (), None, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`[total, num_heads, head_dim]`; LSE is `[num_heads, total]`. No backward with a block_table."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    packs = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _Attend.apply(q, k, v, packs, block_table, *options)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packs: tuple[Any, ...],
        block_table: Tensor | None,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_attn_probs: bool,
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        head_dim = q.shape[-1]
        q, k, v = (pad(_contiguous(x), (0, -head_dim % 8)) for x in (q, k, v))
        rules = (dropout_p, scale, causal, *window_size, softcap)
        weights = return_attn_probs and dropout_p > 0
        if packs:
            cu_seqlens_q, cu_seqlens_k, max_q, max_k = packs
            lengths = (cu_seqlens_q, cu_seqlens_k, None, None, block_table, alibi_slopes, max_q, max_k)
            results = flash_attn_2_cuda.varlen_fwd(
                q, k, v, None, *lengths, *rules[:2], False, *rules[2:], weights, None
            )
        else:
            results = flash_attn_2_cuda.fwd(q, k, v, None, alibi_slopes, *rules, weights, None)
        out, lse, marked, state = results
        ctx.save_for_backward(q, k, v, out, lse, state)
        ctx.packs, ctx.rules, ctx.alibi_slopes, ctx.deterministic = packs, rules, alibi_slopes, deterministic
        out = out[..., :head_dim]
        return (out, lse, marked) if return_attn_probs else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *unused: Any) -> Any:
        q, k, v, out, lse, state = ctx.saved_tensors
        head_dim = dout.shape[-1]
        operands = (pad(_contiguous(dout), (0, -head_dim % 8)), q, k, v, out, lse)
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        end = (ctx.deterministic, None, state)
        rules = ctx.rules
        if ctx.packs:
            cu_seqlens_q, cu_seqlens_k, max_q, max_k = ctx.packs
            lengths = (cu_seqlens_q, cu_seqlens_k, ctx.alibi_slopes, max_q, max_k)
            flash_attn_2_cuda.varlen_bwd(*operands, *grads, *lengths, *rules[:2], False, *rules[2:], *end)
        else:
            flash_attn_2_cuda.bwd(*operands, *grads, ctx.alibi_slopes, *rules, *end)
        return (*(grad[..., :head_dim] for grad in grads), *(None,) * 10)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Queries `[batch, seqlen, num_heads, head_dim]` against a cache, in rows or in pages. No backward."""
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((k_cache.shape[0],), cache_seqlens, dtype=torch.int32)
    out, lse = flash_attn_2_cuda.fwd_kvcache(
        _contiguous(q),
        k_cache,
        v_cache,
        k if k is None else _contiguous(k),
        v if v is None else _contiguous(v),
        cache_seqlens,
        rotary_cos,
        rotary_sin,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        alibi_slopes,
        None,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal,
        *window_size,
        softcap,
        rotary_interleaved,
        num_splits,
    )
    return (out, lse) if return_softmax_lse else out


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
