"""A double of FlashAttention-4's `_flash_attn_fwd` and `_flash_attn_bwd`, which check, compile and launch its kernels.

Their checks are assertions, and what they do with windows and with the LSE is as in 4.0.0b36. Over them runs the real
`interface.py` of FlashAttention-4, or a stand-in for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Rules
from .batch import Batch, backward_of, batch_of, forward_of

#: The device that it would be compiled for: 90 is a Hopper, 100 a Blackwell.
ARCH = 90
DTYPES = (torch.float16, torch.bfloat16)
#: Pages of as many keys as a tile has are loaded as tiles are. For larger head_dims, tiles are others.
PAGE_OF_A_TILE = 128
#: What changes how the kernels come to a result, and not the result.
ONLY_SPEED = {"max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "num_splits", "pack_gqa", "deterministic"}


def flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, page_table: Tensor | None = None, **rest: Any
) -> tuple[Tensor | None, ...]:
    """(out, lse, and three that only sparse attention has). The LSE is None unless a gradient or `return_lse` needs it.

    q, k and v are in rows, `[batch, seqlen, num_heads, head_dim]`, or packed, `[total, num_heads, head_dim]`; the LSE
    is `[batch, num_heads, seqlen]` or `[num_heads, total]`.
    """
    needs_lse = return_lse or any(x.requires_grad for x in (q, k, v))
    assert v.dtype in DTYPES, "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    assert all(x.device.type == "cpu" for x in (q, k, v)), "inputs must be on CUDA device"
    if page_table is not None:
        assert page_table.dtype == torch.int32, "page_table must be int32"
        assert rest.get("cu_seqlens_k") is None, "page_table is not supported with cu_seqlens_k"
    assert_head_dims(q.shape[-1], v.shape[-1])
    if page_table is not None and k.shape[1] != PAGE_OF_A_TILE:
        assert q.shape[-1] % 16 == v.shape[-1] % 16 == 0, "Paged KV does not support irregular head dim"
    out, lse = forward_of(q, k, v, *_asked(q, k, v, page_table=page_table, **rest))
    return out, lse if needs_lse else None, None, None, None


def flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    *,
    dlse: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). It knows nothing of pages: to it, these are another number of keys."""
    batch, rules = _asked(q, k, v, softmax_scale=softmax_scale, causal=causal, softcap=softcap, **rest)
    if ARCH // 10 == 9 and q.shape[-2] != k.shape[-2]:
        assert q.shape[-1] == v.shape[-1], "GQA backward requires head_dim == head_dim_v"
    if ARCH // 10 in (10, 11) and q.shape[-1] == 256:
        is_window = rules.left is not None or rules.right not in (None, 0)
        assert not is_window, "SM100 backward with head_dim=256 does not support local attention"
    assert lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0]))
    assert dout.shape == out.shape
    return backward_of(dout, dlse, q, k, v, out, lse, batch, rules)


def _asked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    **rest: Any,
) -> tuple[Batch, Rules]:
    """What both passes are told, checked: where the sequences lie, and which scores count."""
    for name in rest.keys() - ONLY_SPEED:
        if rest[name] is not None and rest[name] is not False:
            raise NotImplementedError(f"{name}: this double of FlashAttention-4 takes only None, got {rest[name]!r}")
    size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    for x in (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        if x is not None:
            assert x.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be int32"
            assert x.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be contiguous"
    assert k.shape == (*v.shape[:-1], q.shape[-1])
    if cu_seqlens_k is not None:
        assert cu_seqlens_k.shape == (size + 1,), "cu_seqlens_k must have shape (batch_size + 1,)"
    else:
        assert (k if page_table is None else page_table).shape[0] == size
    assert all(x is None or x.shape == (size,) for x in (seqused_q, seqused_k)), "seqused must have shape (batch_size,)"
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"

    left, right = window_size_left, window_size_right
    if left is not None and right is not None and left < 0 and right < 0:  # -1 beside a limit is no limit, but -1
        left = right = None
    packs = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    batch = batch_of(q, k, **packs, seqused_q=seqused_q, seqused_k=seqused_k, page_table=page_table)
    rules = Rules(
        scale=1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        softcap=softcap or 0.0,
        left=left,
        right=0 if causal else right,
        empty_lse=-math.inf,
    )
    return batch, rules


def assert_head_dims(head_dim: int, head_dim_v: int) -> None:
    assert head_dim % 8 == 0, "head_dim must be divisible by 8"
    assert head_dim_v % 8 == 0, "head_dim_v must be divisible by 8"
    pair = f"(head_dim, head_dim_v)=({head_dim}, {head_dim_v})"
    if ARCH // 10 == 9:
        fits = 8 <= head_dim <= 256 and 8 <= head_dim_v <= 256
        assert fits, f"{pair} is not supported on SM90."
    elif ARCH // 10 in (10, 11):
        fits = (8 <= head_dim <= 128 and 8 <= head_dim_v <= 128) or (head_dim, head_dim_v) in ((192, 128), (256, 256))
        assert fits, f"{pair} is not supported on SM100/SM110."
