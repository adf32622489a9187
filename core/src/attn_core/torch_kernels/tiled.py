"""torch/tiled: attention whose cost follows the mask.

Queries are grouped into tiles; each reads the keys that it can see, and batches of tiles are small dense problems for
the device's dense kernel. Nothing of size seqlen_q * seqlen_kv is ever made. `tiling/` says how a mask is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal, Mask, Window
from ..capabilities import ANY_DEVICE, ANY_DIM, Backward, Capabilities
from ..cost import Cost
from ..kernel import Kernel
from .tiling.function import Tiled


def run(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    assert isinstance(bias, Mask)
    if scale <= 0:  # the causal dense kernels mask before they scale: 0 * -inf is NaN
        query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
    out, lse = Tiled.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out
