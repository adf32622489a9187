"""Runs FlashAttention-2. Imports it: this module is imported when its kernel is first chosen.

By its public functions. They pad a head_dim that is no multiple of 8, and are differentiable; those for dense and
packed sequences are ops of torch, so that a graph can hold them.

Where ALiBi stands beside a causal mask and the LSE is asked for, the mask is told as a window that reaches all keys
before the diagonal: told as causal, the kernels add slope * key in place of a distance, which changes every LSE.
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
from .operands import cache_of, slopes_of

_flash: Any = library.FA2.module()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`; of Paged, key and value are the pages as they lie."""
    it = asked(bias)
    told = None if it.segments is None else packed(it.segments, query, key)
    causal, window = it.causal, window_of(it.left, it.right, told)
    if causal and it.alibi is not None and return_lse:
        longest = key.shape[1] if told is None else told.max_kv
        causal, window = False, (longest - 1, 0)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": window,
        "softcap": 0.0 if softcap is None else softcap,
        "alibi_slopes": None if it.alibi is None else slopes_of(it.alibi, query.device, it.segments),
    }
    if it.cache is not None:
        seqlens, table = cache_of(it.cache, query.shape[0], key)
        options |= {"cache_seqlens": seqlens, "block_table": table, "return_softmax_lse": return_lse}
        return of_dense(_flash.flash_attn_with_kvcache(query, key, value, **options), return_lse)
    options |= {
        "dropout_p": dropout_p,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_attn_probs": return_lse,
    }
    if told is None:
        return of_dense(_flash.flash_attn_func(query, key, value, **options), return_lse)
    lengths = lengths_of(told)
    result = _flash.flash_attn_varlen_func(flat(query), flat(key), flat(value), **lengths, **options)
    return of_packed(result, query.shape[0], return_lse)
