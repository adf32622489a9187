"""The checks of FlashAttention-3's extension, as of `flash_api.cpp` in its folder `hopper`; the device is a Hopper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Rules
from .batch import Batch, backward_of, batch_of, forward_of
from .extension import check, check_device, check_int32, check_shape

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse): a row that sees no key has -inf, but every row +inf where nobody has a key."""
    check(q.dtype in DTYPES, "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    for name, x in {"query": q, "key": k, "value": v}.items():
        check(x.dtype == q.dtype, f"query and {name} must have the same dtype")
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    check_device(q=q, k=k, v=v)
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q}
    for name, x in (lengths | {"seqused_k": seqused_k, "page_table": page_table}).items():
        if x is not None:
            check_int32(**{name: x})
    check(cu_seqlens_q is None or max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
    check(cu_seqlens_k is None or max_seqlen_k is not None, "max_seqlen_k must be provided if cu_seqlens_k is provided")
    check(cu_seqlens_k is None or page_table is None, "If cu_seqlens_k is passed in, then page table is not supported")

    size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    heads, head_dim = q.shape[-2:]
    heads_k, head_dim_v = v.shape[-2:]
    check_heads(heads, heads_k, head_dim, head_dim_v)
    check_shape("k", k, *v.shape[:-1], head_dim)
    if cu_seqlens_k is not None:
        check_shape("cu_seqlens_k", cu_seqlens_k, size + 1)
    elif page_table is None:
        check(k.shape[0] == size, "batch_size must be equal to batch_size_k")
    else:
        check_shape("page_table", page_table, size, page_table.shape[1])
    for name, x in {"seqused_q": seqused_q, "seqused_k": seqused_k}.items():
        if x is not None:
            check_shape(name, x, size)

    packs = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    batch = batch_of(q, k, **packs, seqused_q=seqused_q, seqused_k=seqused_k, page_table=page_table)
    rules = Rules(
        scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
        left=None if window_size[0] < 0 else window_size[0],
        right=0 if causal else None if window_size[1] < 0 else window_size[1],
        empty_lse=math.inf if k.numel() == 0 else -math.inf,
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        largest = max(head_dim, head_dim_v)
        check(largest <= MAX_HEAD_DIM, "FlashAttention forward only supports head dimension at most 256")
        check(not deterministic or largest <= 192, "Deterministic backward not supported for hdim 256.")
    return _Attend.apply(q, k, v, batch, rules)


class _Attend(torch.autograd.Function):
    """No gradient flows from the LSE, as in FlashAttention-3."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: Batch, rules: Rules) -> tuple[Tensor, Tensor]:
        out, lse = forward_of(q, k, v, batch, rules)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.batch, ctx.rules = batch, rules
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        return (*backward_of(dout, None, *ctx.saved_tensors, ctx.batch, ctx.rules), None, None)


def check_heads(heads: int, heads_k: int, head_dim: int, head_dim_v: int) -> None:
    check(head_dim <= MAX_HEAD_DIM, "FlashAttention forward only supports head dimension at most 256")
    check(heads % heads_k == 0, "Number of heads in key/value must divide number of heads in query")
    check(head_dim % 8 == 0, "head_size should be a multiple of 8")
    check(head_dim_v % 8 == 0, "head_size_v should be a multiple of 8")
    small = head_dim <= 64 and head_dim_v <= 512
    middle = 128 < head_dim <= 192 and 96 < head_dim_v <= 128
    check(
        head_dim_v == head_dim or small or middle,
        "If V headdim is different from Q/K dim, we only support Q/K headdim in (128, 192] and V headdim in (96, 128],"
        " or (Q/K <= 64 and V <= 512).",
    )
