"""What FA3 and FA4 do with a batch, whose sequences lie in rows, packed behind one another, in a cache or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Rules, backward, forward
from .sequences import At, at, garbage, in_pages, lse_at


@dataclass(frozen=True)
class Batch:
    """Where the sequences lie: indices into query, and into key and value."""

    queries: list[At]
    keys: list[Any]


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
    return Batch(queries, keys)


def _seqlen(entry: int, offsets: list[int] | None, used: Tensor | None, full: int) -> int:
    if used is not None:
        return int(used[entry])
    return full if offsets is None else offsets[entry + 1] - offsets[entry]


def forward_of(q: Tensor, k: Tensor, v: Tensor, batch: Batch, rules: Rules) -> tuple[Tensor, Tensor]:
    """(out, lse) of a batch; rows that belong to no sequence are not written."""
    heads = q.shape[-2]
    out = garbage(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = garbage(*((q.shape[0], heads, q.shape[1]) if q.ndim == 4 else (heads, q.shape[0])), dtype=torch.float32)
    for queries, keys in zip(batch.queries, batch.keys):
        out[queries], lse[lse_at(queries)], _ = forward(q[queries], k[keys], v[keys], rules)
    return out, lse


def backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Batch,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a batch; rows that belong to no sequence are not written."""
    dq, dk, dv = (garbage(*x.shape, dtype=x.dtype) for x in (q, k, v))
    for queries, keys in zip(batch.queries, batch.keys):
        of_lse = lse_at(queries)
        made = (dout[queries], q[queries], k[keys], v[keys], out[queries], lse[of_lse], rules)
        dq[queries], dk[keys], dv[keys] = backward(*made, grad_lse=None if dlse is None else dlse[of_lse])
    return dq, dk, dv
