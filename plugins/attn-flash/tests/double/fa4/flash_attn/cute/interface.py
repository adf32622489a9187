"""FlashAttention-4's functions, by the signatures of 4.0.0b36.

What nothing here uses (functions of scores and masks, sparse blocks, sinks, qv) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flash_double.fa4 import flash_attn_bwd, flash_attn_fwd
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`[batch, seqlen, num_heads, head_dim]`; LSE is `[batch, num_heads, seqlen]`."""
    left, right = window_size
    rules = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    rules |= {"window_size_left": left, "window_size_right": right}
    unused = {"qv": qv, "gather_kv_indices": gather_kv_indices, "learnable_sink": learnable_sink}
    unused |= {"score_mod": score_mod, "mask_mod": mask_mod, "aux_tensors": aux_tensors, "aux_scalars": aux_scalars}
    unused |= {"score_mod_bwd": score_mod_bwd, "block_sparse_tensors_bwd": block_sparse_tensors_bwd}
    unused |= {"block_sparse_tensors": block_sparse_tensors, "gather_bwd_recompute_p": gather_bwd_recompute_p}
    unused |= {"gather_bwd_token_chunk": gather_bwd_token_chunk}
    return _Attend.apply(q, k, v, rules | unused, None, return_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed, `[total, …]`, or in rows; keys also in pages. The LSE of packed ones is `[num_heads, total]`."""
    left, right = window_size
    rules = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    rules |= {"window_size_left": left, "window_size_right": right}
    rules |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    rules |= {"seqused_q": seqused_q, "seqused_k": seqused_k}
    unused = {"qv": qv, "gather_kv_indices": gather_kv_indices, "learnable_sink": learnable_sink}
    unused |= {"score_mod": score_mod, "mask_mod": mask_mod, "aux_tensors": aux_tensors, "aux_scalars": aux_scalars}
    unused |= {"score_mod_bwd": score_mod_bwd, "block_sparse_tensors": block_sparse_tensors}
    unused |= {"scheduler_metadata": scheduler_metadata, "seqlen_k_per_split": seqlen_k_per_split}
    unused |= {"gather_bwd_recompute_p": gather_bwd_recompute_p, "gather_bwd_token_chunk": gather_bwd_token_chunk}
    return _Attend.apply(q, k, v, rules | unused, page_table, return_lse)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rules: dict[str, Any],
        page_table: Tensor | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse, *_ = flash_attn_fwd(q, k, v, **rules, page_table=page_table, return_lse=return_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rules, ctx.return_lse = rules, return_lse
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        made = flash_attn_bwd(q, k, v, out, dout, lse, **ctx.rules, dlse=dlse if ctx.return_lse else None)
        return (*made, None, None, None)
