"""Which queries see no key, where only the numbers in a tensor tell: lengths of keys, or a dense bias."""

from __future__ import annotations

import torch
from attn_core import AttnBias, Cached, KeyPadding, TensorBias
from attn_core.bias.segments import band_of
from attn_core.bias.zero_padded import ZeroPadded
from attn_core.torch_kernels.dense import additive, of_rank_four
from attn_core.torch_kernels.dense import empty_rows as of_dense
from torch import Tensor


def by_lengths(bias: AttnBias | None, seqlen_q: int, device: torch.device) -> Tensor | None:
    """`[batch, seqlen_q]`, True for a query that sees none of the keys that exist; None for other biases."""
    if isinstance(bias, ZeroPadded):
        bias = bias.padded
    if isinstance(bias, KeyPadding):
        return (bias.seqlens.to(device) == 0)[:, None].expand(-1, seqlen_q)
    if not isinstance(bias, Cached):
        return None
    seqlens = bias.seqlens_kv.to(device, torch.int64)[:, None]
    left, right, _ = band_of(bias.within)  # from the bottom right: no other is sent
    diagonal = torch.arange(seqlen_q, device=device) + seqlens - seqlen_q
    empty = (seqlens == 0).expand(-1, seqlen_q)
    if right is not None:
        empty = empty | (diagonal + right < 0)
    return empty if left is None else empty | (diagonal - left >= seqlens)


def by_tensor(bias: AttnBias | None, dtype: torch.dtype) -> Tensor | None:
    """Broadcastable to `[batch, num_heads, seqlen_q]`, True where a dense bias masks every key; None for others."""
    if not isinstance(bias, TensorBias):
        return None
    return of_dense(of_rank_four(additive(bias, dtype)))
