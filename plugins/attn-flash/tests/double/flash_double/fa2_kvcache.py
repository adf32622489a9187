"""`fwd_kvcache`: a few queries per sequence against a cache, which takes new keys and values first."""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import forward
from .extension import check, check_int32, check_launch, check_shape, extension
from .fa2_parts import check_operands, check_pages, check_problem, padded, rules, slopes_of, written_into
from .sequences import garbage, in_pages


@extension
def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k_: Tensor | None,
    v_: Tensor | None,
    seqlens_k_: Tensor | None,
    rotary_cos_: Tensor | None,
    rotary_sin_: Tensor | None,
    cache_batch_idx_: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    out_: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse] of `[batch, seqlen_q, num_heads, head_dim]`; `k_` and `v_` are written into the cache."""
    check_operands(q, kcache, vcache)
    batch, seqlen_q, heads, head_dim = q.shape
    heads_k = kcache.shape[2]
    check_problem(batch, head_dim, heads, heads_k, softcap, 0.0)
    check(rotary_cos_ is None and rotary_sin_ is None, "this double has no rotary embeddings")
    check(num_splits <= 128, "num_splits > 128 not supported")
    if block_table_ is None:
        capacity = kcache.shape[1]
        for name, x in {"kcache": kcache, "vcache": vcache}.items():
            check_shape(name, x, kcache.shape[0], capacity, heads_k, head_dim)
    else:
        check(cache_batch_idx_ is None, "Paged KVcache does not support cache_batch_idx")
        check(leftpad_k_ is None, "We don't support Paged KV and leftpad_k running at the same time yet")
        check_pages(kcache, vcache, block_table_, batch, heads_k, head_dim)
        capacity = block_table_.shape[1] * kcache.shape[1]

    for name, x in {"seqlens_k": seqlens_k_, "cache_batch_idx": cache_batch_idx_, "leftpad_k": leftpad_k_}.items():
        if x is not None:
            check_int32(**{name: x})
            check_shape(name, x, batch)
    cached = [capacity] * batch if seqlens_k_ is None else seqlens_k_.tolist()
    entries = list(range(batch)) if cache_batch_idx_ is None else cache_batch_idx_.tolist()
    skipped = [0] * batch if leftpad_k_ is None else leftpad_k_.tolist()

    added = 0
    if k_ is not None:
        check(v_ is not None, "If key is supplied, value must also be passed in")
        check(seqlens_k_ is not None, "If key is supplied, seqlens_k must also be passed in")
        check(seqlen_q <= capacity, "If key is supplied, it must have seqlen <= the seqlen of the KV cache")
        added = k_.shape[1]
        for name, x, cache in (("k", k_, kcache), ("v", v_, vcache)):
            check(x.dtype == q.dtype, f"{name} must have the same dtype as query")
            check_shape(name, x, batch, added, heads_k, head_dim)
            for b in range(batch):
                start, stop = cached[b], cached[b] + added
                if block_table_ is not None:
                    cache[in_pages(cache, block_table_, b, start, stop)] = x[b]
                else:
                    check(stop <= capacity, "CUDA error: an illegal memory access was encountered")
                    cache[entries[b], start:stop] = x[b]

    causal = is_causal and (seqlen_q > 1 or alibi_slopes_ is not None)
    ruled = rules(softmax_scale, softcap, 0.0, causal, window_size_left, window_size_right, capacity)
    slopes = slopes_of(alibi_slopes_, batch, heads)
    out = written_into(out_, q)
    lse = garbage(batch, heads, seqlen_q, dtype=torch.float32)
    check_launch(seqlen_q)
    for b in range(batch):
        seqlen_k = cached[b] + added
        if block_table_ is None:
            keys = (entries[b], slice(skipped[b], seqlen_k))
        else:
            keys = in_pages(kcache, block_table_, b, 0, seqlen_k)
        made, lse[b], _ = forward(padded(q[b]), padded(kcache[keys]), padded(vcache[keys]), ruled(slopes, b))
        out[b] = made[..., :head_dim]
    return [out, lse]
