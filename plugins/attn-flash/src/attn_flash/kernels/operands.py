"""Operands as the libraries take them: packed sequences, lengths of caches and tables of pages in int32, slopes.

Lengths and pages that lie on a device were not looked at before, so they are brought into their bounds: a wrong one
reads no other memory, and neither does one behind a sequence's end, which may be anything.
"""

from __future__ import annotations

import torch
from attn_core import ALiBi, Cached, KeyPadding, Paged, Segments
from attn_core.bias.documents import unpack
from attn_core.torch_kernels.fa_window import slopes_of as slopes_in_float32
from attn_core.tracing import constant
from torch import Tensor


def cache_of(cache: Cached | KeyPadding | Paged, batch: int, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """Lengths of the sequences `[batch]`, and the table of their pages `[batch, max_pages]` or None; int32."""
    given = cache.seqlens if isinstance(cache, KeyPadding) else cache.seqlens_kv
    seqlens = given.to(key.device).clamp(0, cache.bound_lengths()[1]).to(torch.int32).expand(batch).contiguous()
    if not isinstance(cache, Paged):
        return seqlens, None
    table = cache.page_table.to(key.device).clamp(0, max(key.shape[0] - 1, 0)).to(torch.int32)
    return seqlens, table.expand(batch, -1).contiguous()


def slopes_of(alibi: ALiBi, device: torch.device, segments: Segments | None) -> Tensor:
    """Slopes in float32, `[num_heads]`, or `[sequences, num_heads]` where each batch entry has its own."""
    slopes = slopes_in_float32(alibi, device)
    if slopes.ndim == 2 and segments is not None:
        slopes = slopes.repeat_interleave(_count(segments.packed), 0)
    return slopes


@constant
def _count(packed: bytes) -> int:
    """How many documents there are."""
    return len(unpack(packed).k0)
