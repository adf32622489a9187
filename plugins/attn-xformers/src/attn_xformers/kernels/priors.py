"""What xFormers' operators are taken for on CUDA: priors, not measured here.

`cutlass` and `flash` call what torch/efficient and torch/flash call, with some 20 µs of Python before; none is taken
for faster than torch's own, so that installing xFormers moves a call only where torch's kernels refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attn_core import Cost
from attn_core.torch_kernels.efficient import KERNEL as TORCH_EFFICIENT
from attn_core.torch_kernels.flash import KERNEL as TORCH_FLASH

FRONT_END = 30e-6


def _behind_the_front_end(cost: Cost, **changes: Any) -> Cost:
    return replace(cost, call=cost.call + FRONT_END, source="prior", **changes)


CUTLASS = _behind_the_front_end(TORCH_EFFICIENT.costs["cuda"])
FLASH = _behind_the_front_end(TORCH_FLASH.costs["cuda"])
#: FlashAttention 3 on Hopper, and CUTLASS on Blackwell, are published as faster per pair than FlashAttention 2.
FLASH3 = replace(FLASH, pair_dim=6e-15, backward=3.0)
BLACKWELL = replace(FLASH, pair_dim=5e-15, backward=3.0)
#: Made for few queries and many keys: reads keys and values once, at about the bandwidth of the memory.
SPLITK = replace(FLASH, call=FLASH.call + 30e-6, pair_dim=10e-15)

COSTS: Mapping[str, Mapping[str, Cost]] = {
    "cutlass": {"cuda": CUTLASS},
    "cutlass-blackwell": {"cuda": BLACKWELL},
    "flash": {"cuda": FLASH},
    "flash3": {"cuda": FLASH3},
    "flash3-splitkv": {"cuda": FLASH3},
    "triton-splitk": {"cuda": SPLITK},
    "ck": {"cuda": CUTLASS},
    "ck-splitk": {"cuda": SPLITK},
}
