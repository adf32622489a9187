"""Runs FlashAttention-3. Imports it: this module is imported when its kernel is first chosen.

What its functions return changed with its betas: the output and the LSE, the output alone, and both where
`return_attn_probs` asks for it; with a cache, more behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from attn_core import AttnBias
from attn_core.torch_kernels.packed import flat, packed
from torch import Tensor

from .. import library
from .fa3 import FUNCTION
from .forms import lengths_of, of_dense, of_packed, window_of
from .masks import asked
from .operands import cache_of

_flash: Any = library.FA3.module()
_TELLS_THE_LSE = library.FA3.takes(FUNCTION, "return_attn_probs")


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
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": it.causal,
        "window_size": window_of(it.left, it.right, told),
        "softcap": 0.0 if softcap is None else softcap,
    }
    if it.cache is not None:
        seqlens, table = cache_of(it.cache, query.shape[0], key)
        options |= {"cache_seqlens": seqlens, "page_table": table, "return_softmax_lse": return_lse}
        return of_dense(_flash.flash_attn_with_kvcache(query, key, value, **options), return_lse)
    options |= {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if _TELLS_THE_LSE:
        options["return_attn_probs"] = return_lse
    if told is None:
        return of_dense(_flash.flash_attn_func(query, key, value, **options), return_lse)
    lengths = {**lengths_of(told), "seqused_k": told.used_kv}
    result = _flash.flash_attn_varlen_func(flat(query), flat(key), flat(value), **lengths, **options)
    return of_packed(result, query.shape[0], return_lse)
