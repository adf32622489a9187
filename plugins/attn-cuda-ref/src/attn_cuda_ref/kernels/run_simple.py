"""Runs cuda-ref/simple. Imported when it is first chosen; what it compiles, at the first call of a kind."""

from __future__ import annotations

from typing import Any

import torch
from attn_core import AttnBias
from torch import Tensor

from .. import ops  # defines them
from ..translate import translated

_forward = getattr(torch.ops, ops.NAMESPACE).simple_forward.default


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
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    out, lse = _forward(query, key, value, *translated(bias, query.device), scale, softcap)
    return (out, lse) if return_lse else out
