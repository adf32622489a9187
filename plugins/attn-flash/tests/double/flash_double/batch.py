"""What FA3 and FA4 do with a batch: one function takes sequences in rows, packed, in a cache or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Rules, backward, forward
from .extension import check
from .sequences import At, at, garbage, in_pages, lse_at


@dataclass(frozen=True)
class Batch:
    """Where the sequences lie: indices into query, and into key and value."""

    queries: list[At]
    keys: list[Any]
    is_paged: bool = False  #: then there is no backward pass


def batch_of(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Batch:
    """q is `[batch, seqlen, …]`, or `[total, …]` with `cu_seqlens_q`; k as well, or `[num_pages, page_size, …]`."""
    size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    offsets_q, offsets_k = (None if cu is None else cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
    queries: list[At] = []
    keys: list[Any] = []
    for b in range(size):
        seqlen_q = _seqlen(b, offsets_q, seqused_q, q.shape[1])
        capacity = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
        seqlen_k = _seqlen(b, offsets_k, seqused_k, capacity)
        queries.append(at(b, offsets_q, seqlen_q))
        keys.append(at(b, offsets_k, seqlen_k) if page_table is None else in_pages(k, page_table, b, 0, seqlen_k))
    return Batch(queries, keys, page_table is not None)


def _seqlen(entry: int, offsets: list[int] | None, used: Tensor | None, full: int) -> int:
    if used is not None:
        return int(used[entry])
    return full if offsets is None else offsets[entry + 1] - offsets[entry]


class Attend(torch.autograd.Function):
    """(out, lse) of a batch; rows that belong to no sequence are not written."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: Batch, rules: Rules, lse_grad: bool) -> Any:
        heads = q.shape[-2]
        out = garbage(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        shape = (q.shape[0], heads, q.shape[1]) if q.ndim == 4 else (heads, q.shape[0])
        lse = garbage(*shape, dtype=torch.float32)
        for queries, keys in zip(batch.queries, batch.keys):
            out[queries], lse[lse_at(queries)], _ = forward(q[queries], k[keys], v[keys], rules)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.batch, ctx.rules, ctx.lse_grad = batch, rules, lse_grad
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        check(not ctx.batch.is_paged, "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
        dq, dk, dv = (garbage(*x.shape, dtype=x.dtype) for x in (q, k, v))
        for queries, keys in zip(ctx.batch.queries, ctx.batch.keys):
            to_lse = dlse[lse_at(queries)] if ctx.lse_grad else None
            dq[queries], dk[keys], dv[keys] = backward(
                dout[queries],
                q[queries],
                k[keys],
                v[keys],
                out[queries],
                lse[lse_at(queries)],
                ctx.rules,
                grad_lse=to_lse,
            )
        return dq, dk, dv, None, None, None
