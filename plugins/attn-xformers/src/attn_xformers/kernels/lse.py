"""xFormers' LSE as ours: `[batch, num_heads, seqlen_q]`, float32, -inf where a query sees no key.

    dense                        [batch, heads, seqlen_q or more]: cutlass pads to a multiple of 32, with +inf
    GQA                          as all of these, with two dimensions for the heads
    documents, packed            [1, heads, queries of all]
    documents, padded            [documents, heads, queries of the longest or more], padded with +inf

Which of the two documents get, an operator says by VARLEN_LSE_PACKED.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

INFINITY = float("inf")


def ours(lse: Tensor, sent: Any, *, packed: bool, batch: int, seqlen_q: int, is_packed_lse: bool) -> Tensor:
    """`lse` of `sent`, as we have it; what is +inf there is a row without keys."""
    if sent.query.ndim == 5:
        lse = lse.flatten(1, 2)
    if not packed:
        lse = lse[:, :, :seqlen_q]
    else:
        starts = sent.attn_bias.q_seqinfo.seqstart_py
        if not is_packed_lse:
            documents, places = places_of(tuple(starts), lse.device)
            lse = lse.permute(0, 2, 1)[documents, places].t()[None]  # [1, heads, queries of all]
        lse = lse[0, :, : batch * seqlen_q].reshape(-1, batch, seqlen_q).transpose(0, 1)
    return lse.float().masked_fill(lse == INFINITY, -INFINITY)


@lru_cache(maxsize=8)
def places_of(starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each query, its document, and its place there; documents begin at `starts`, and the last one ends there."""
    with torch.inference_mode(False):
        begin = torch.tensor(starts)
        documents = torch.repeat_interleave(torch.arange(len(starts) - 1), begin.diff())
        return documents.to(device), (torch.arange(starts[-1]) - begin[documents]).to(device)
