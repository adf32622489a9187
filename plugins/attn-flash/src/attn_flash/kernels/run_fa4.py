"""Runs FlashAttention-4. Imports it: this module is imported when its kernel is first chosen.

Its functions always return (out, lse), the LSE None unless it is asked for or a gradient needs it. Where keys lie in a
cache or in pages, the one for varying lengths takes them as they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from attn_core import AttnBias
from attn_core.torch_kernels.packed import flat, packed
from torch import Tensor

from .. import library
from .forms import lengths_of, of_dense, of_packed, window_of
from .masks import asked
from .operands import cache_of

_flash: Any = library.FA4.module()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`; of Paged, key and value are the pages as they lie."""
    it = asked(bias)
    told = None if it.segments is None else packed(it.segments, query, key)
    left, right = window_of(it.left, it.right, told)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": it.causal,
        "window_size": (None if left < 0 else left, None if right < 0 else right),
        "softcap": 0.0 if softcap is None else softcap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_lse": return_lse,
    }
    if told is not None:
        lengths = {**lengths_of(told), "seqused_k": told.used_kv}
        result = _flash.flash_attn_varlen_func(flat(query), flat(key), flat(value), **lengths, **options)
        return of_packed(result, query.shape[0], return_lse)
    if it.cache is None:
        return of_dense(_flash.flash_attn_func(query, key, value, **options), return_lse)
    seqlens, table = cache_of(it.cache, query.shape[0], key)
    lengths = {"seqused_k": seqlens, "page_table": table, "max_seqlen_k": it.cache.bound_lengths()[1]}
    return of_dense(_flash.flash_attn_varlen_func(query, key, value, **lengths, **options), return_lse)
