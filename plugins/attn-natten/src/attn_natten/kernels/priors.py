"""What NATTEN's kernels are taken for: on CUDA priors, not measured here; on the CPU multiples of torch/flex.

From what is published of them: the CUTLASS 2 kernels are those of memory-efficient attention, with a mask that is
computed per element; those for Hopper and Blackwell are as fast per pair as the best dense kernels, and permute their
operands first (arXiv:2504.16922). Of the dense ones none is taken for faster than torch's own, so that installing
NATTEN moves a dense call to it only where torch's kernels refuse.
"""

from __future__ import annotations

from dataclasses import replace

from attn_core import Cost
from attn_core.torch_kernels.flex import KERNEL as TORCH_FLEX

CUTLASS_FNA = Cost(call=60e-6, pair_dim=24e-15, pair=1.2e-12, token_dim=1e-12, backward=3.0)
HOPPER_FNA = Cost(call=90e-6, pair_dim=8e-15, pair=0.3e-12, token_dim=3.5e-12, backward=3.0)
BLACKWELL_FNA = Cost(call=90e-6, pair_dim=8e-15, pair=0.25e-12, token_dim=3e-12, backward=3.0)

CUTLASS_FMHA = Cost(call=50e-6, pair_dim=16e-15, pair=0.7e-12, token_dim=1e-12)
HOPPER_FMHA = Cost(call=50e-6, pair_dim=8.5e-15, pair=0.3e-12, token_dim=1e-12, backward=3.5)
BLACKWELL_FMHA = Cost(call=50e-6, pair_dim=8.5e-15, pair=0.25e-12, token_dim=1e-12, backward=3.5)

#: Outside a graph FlexAttention writes all scores, some ten times, and the mask of a neighborhood before.
FLEX = Cost(call=800e-6, pair_dim=40e-15, pair=30e-12, token_dim=2e-12, added=50e-12)

#: On the CPU it is the same function of torch as torch/flex. Timed beside it on one thread, it is as fast without a
#: mask, and takes about twice as long with one, which is made anew at every call.
FLEX_FMHA_ON_CPU = replace(TORCH_FLEX.costs["cpu"], source="as torch/flex, timed beside it")
FLEX_FNA_ON_CPU = replace(
    FLEX_FMHA_ON_CPU, call=FLEX_FMHA_ON_CPU.call + 3.3e-3, added=2e-8, source="by torch/flex, timed beside it"
)
