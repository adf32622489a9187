"""The checks of FlashAttention-4's `interface.py`, which are assertions, and how it resolves its windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import Rules
from .batch import Attend, batch_of

#: The device that it would be compiled for: 90 is a Hopper, 100 a Blackwell.
ARCH = 90
DTYPES = (torch.float16, torch.bfloat16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    return_lse: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse), always; the LSE is None unless it is asked for or an operand requires a gradient."""
    assert v.dtype in DTYPES, "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    heads, head_dim = q.shape[-2:]
    heads_k, head_dim_v = v.shape[-2:]
    lengths = [x for x in (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) if x is not None]
    for x in (q, k, v, *lengths, *([] if page_table is None else [page_table])):
        assert x.device.type == "cpu", "inputs must be on CUDA device"
    for x in lengths:
        assert x.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be int32"
        assert x.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k must be contiguous"
    if page_table is not None:
        assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
        assert page_table.dtype == torch.int32, "page_table must be int32"
        assert page_table.shape[0] == size
    assert k.shape == (*v.shape[:-1], head_dim)
    assert cu_seqlens_k is not None or page_table is not None or k.shape[0] == size
    assert heads % heads_k == 0, "num_head must be divisible by num_head_kv"
    assert_head_dims(head_dim, head_dim_v)
    assert all(x is None or x.shape == (size,) for x in (seqused_q, seqused_k)), "seqused must have shape (batch_size,)"

    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:  # -1 beside a limit is no limit, but -1
        left = right = None
    if causal:
        right = 0
    packs = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    batch = batch_of(q, k, **packs, seqused_q=seqused_q, seqused_k=seqused_k, page_table=page_table)
    rules = Rules(
        scale=1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale,
        softcap=softcap,
        left=left,
        right=right,
        empty_lse=-math.inf,
    )
    has_lse = return_lse or any(x.requires_grad for x in (q, k, v))
    out, lse = Attend.apply(q, k, v, batch, rules, return_lse)
    return out, lse if has_lse else None


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
