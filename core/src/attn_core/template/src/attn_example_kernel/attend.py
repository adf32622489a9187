"""Attention by plain torch operations: the place for a kernel of your own."""

from __future__ import annotations

import torch
from attn_core import AttnBias, Capabilities, Cost, Kernel, Mask
from torch import Tensor


def run(query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float) -> Tensor:
    """Query is `[batch, seqlen_q, num_heads, head_dim]`, key and value have seqlen_kv; the result is like query."""
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:  # a mask, True where a query may attend a key
        logits = logits.masked_fill(~bias.materialize(logits.device), float("-inf"))
    no_key = logits.isneginf().all(-1, keepdim=True)  # the result of such a query is 0; its softmax would be NaN
    weights = logits.masked_fill(no_key, 0.0).softmax(-1).masked_fill(no_key, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


KERNEL = Kernel(
    name="example-kernel/attend",
    run=run,
    # What is not declared here, `run` is never given.
    capabilities=Capabilities(
        devices={"cpu"},
        dtypes={torch.float32},
        head_dims=range(8, 257, 8),
        biases={Mask},
        backward=True,
        deterministic=True,
    ),
    # Seconds per call and per pair of query and key. It decides where this kernel is chosen: measure yours.
    costs={"cpu": Cost(call=100e-6, pair_dim=50e-12, pair=5e-9, source="a guess")},
)
