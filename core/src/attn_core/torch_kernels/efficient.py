"""torch/efficient: torch's memory-efficient attention (CUTLASS), on CUDA; dense biases, with their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bias import AttnBias, Causal, TensorBias
from ..capabilities import Backward, Capabilities, Refusal
from ..cost import Cost
from ..kernel import Kernel
from ..probes import no_cuda
from ..problem import Problem
from .dense import additive, of_rank_four

_efficient = torch._scaled_dot_product_efficient_attention

#: The kernel reads rows of a bias in vectors; their stride must be a multiple of this many elements.
ALIGNED = 16


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    dropout_p: float = 0.0,
) -> Any:
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    dense = None
    if isinstance(bias, TensorBias):
        dense = aligned(of_rank_four(additive(bias, query.dtype)), query, key)
    grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (dense is not None and dense.requires_grad)
    )
    causal = dense is None and bias is not None
    return _efficient(query, key, value, dense, grad, dropout_p, causal, scale=scale)[0]


def aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """`[batch, num_heads, seqlen_q, seqlen_kv]` with rows that start on an aligned element."""
    seqlen_kv = key.shape[2]
    if bias.shape[-1] == 1:
        bias = bias.expand(*bias.shape[:-1], seqlen_kv)
    rest = -seqlen_kv % ALIGNED
    bias = pad(bias, (0, rest))[..., :seqlen_kv] if rest else bias.contiguous()
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], seqlen_kv)


def refuse(problem: Problem) -> Iterator[Refusal]:
    got = problem.compute_capability
    if problem.dtype is torch.bfloat16 and got is not None and got < (8, 0):
        yield Refusal("dtype", f"takes float16, float32 before sm_80, got bfloat16 on sm_{got[0]}{got[1]}")
    if problem.scale <= 0 and isinstance(problem.bias, Causal):  # masks before it scales: 0 * -inf is NaN
        yield Refusal("bias", f"takes Causal with a scale above 0, got {problem.scale}")


KERNEL = Kernel(
    name="torch/efficient",
    run=run,
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes={torch.float32, torch.float16, torch.bfloat16},
        head_dims=range(8, 1 << 16, 8),
        head_dims_v=range(8, 1 << 16, 8),
        biases={Causal("top-left"), TensorBias},
        backward=Backward(bias_grad=True),
        dropout=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(5, 0),
    ),
    layout="heads-first",
    calls_sdpa=False,
    refuse=refuse,
    probe=no_cuda,
    costs={"cuda": Cost(call=15e-6, pair_dim=16e-15, pair=0.6e-12, token_dim=1e-12, mask=2e-12)},
    skips={Causal},
)
