"""What FlashAttention's kernels are taken for on CUDA: priors, not measured here.

From what is published of them: FlashAttention-2 is the kernel that torch/flash wraps (arXiv:2307.08691), through Python
that takes longer per call; FlashAttention-3 has up to twice its throughput on Hopper (arXiv:2407.08608), and
FlashAttention-4 as much on Hopper and more on Blackwell, at a higher fixed price: its launcher is Python.
"""

from __future__ import annotations

from attn_core import Cost

FA2 = Cost(call=25e-6, pair_dim=8e-15, pair=0.2e-12, token_dim=1e-12)
FA3 = Cost(call=30e-6, pair_dim=5e-15, pair=0.15e-12, token_dim=1e-12)
FA4 = Cost(call=60e-6, pair_dim=4.5e-15, pair=0.12e-12, token_dim=1e-12)
