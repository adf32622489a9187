"""FlashAttention-4's functions, by the signatures of 4.0.0b36.

What nothing here uses (functions of scores and masks, sparse blocks, sinks, qv) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash_double.fa4 import attend
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
    _none(qv=qv, gather_kv_indices=gather_kv_indices, learnable_sink=learnable_sink, score_mod=score_mod)
    _none(score_mod_bwd=score_mod_bwd, mask_mod=mask_mod, aux_tensors=aux_tensors, aux_scalars=aux_scalars)
    _none(block_sparse_tensors=block_sparse_tensors, block_sparse_tensors_bwd=block_sparse_tensors_bwd)
    _none(gather_bwd_recompute_p=gather_bwd_recompute_p or None, gather_bwd_token_chunk=gather_bwd_token_chunk)
    options = {"causal": causal, "window_size": window_size, "softcap": softcap, "return_lse": return_lse}
    return attend(q, k, v, softmax_scale=softmax_scale, **options)


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
    _none(qv=qv, gather_kv_indices=gather_kv_indices, learnable_sink=learnable_sink, score_mod=score_mod)
    _none(score_mod_bwd=score_mod_bwd, mask_mod=mask_mod, aux_tensors=aux_tensors, aux_scalars=aux_scalars)
    _none(block_sparse_tensors=block_sparse_tensors, gather_bwd_token_chunk=gather_bwd_token_chunk)
    _none(gather_bwd_recompute_p=gather_bwd_recompute_p or None)
    options = {"causal": causal, "window_size": window_size, "softcap": softcap, "return_lse": return_lse}
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q}
    lengths |= {"seqused_k": seqused_k, "page_table": page_table}
    return attend(q, k, v, softmax_scale=softmax_scale, **options, **lengths)


def _none(**unused: object) -> None:
    for name, value in unused.items():
        if value is not None:
            raise NotImplementedError(f"{name}: this stand-in for FlashAttention-4 takes only None, got {value!r}")
