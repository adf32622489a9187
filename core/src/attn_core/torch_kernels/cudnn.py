"""torch/cudnn: cuDNN's attention, on CUDA.

Declared narrowly: dense biases and the LSE are left out, since several versions of cuDNN are publicly known to give
wrong results with them (pytorch/pytorch#191612, pytorch/pytorch#196678).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal
from ..capabilities import Backward, Capabilities, Refusal
from ..cost import Cost
from ..kernel import Kernel, Unusable
from ..probes import no_cuda
from ..problem import Problem

_cudnn = torch._scaled_dot_product_cudnn_attention


def run(query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float) -> Any:
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return _cudnn(query, key, value, None, grad, 0.0, bias is not None, False, scale=scale)[0]


def refuse(problem: Problem) -> Iterator[Refusal]:
    if problem.bias is not None and problem.seqlen_q != problem.seqlen_kv:
        lengths = f"seqlen_q={problem.seqlen_q}, seqlen_kv={problem.seqlen_kv}"
        yield Refusal("bias", f"takes a causal mask where the lengths are equal, got {lengths}")
    if problem.seqlen_kv == 1:
        yield Refusal("seqlen_kv", "takes 2 or more keys, got 1")
    if problem.scale <= 0:  # not documented to work, and a rare thing to ask for
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale}")


def probe() -> Unusable | None:
    """Whether there are CUDA and cuDNN at all."""
    missing = no_cuda()
    if missing is None and not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return Unusable("unavailable", "this torch has no cuDNN")
    return missing


KERNEL = Kernel(
    name="torch/cudnn",
    run=run,
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes={torch.float16, torch.bfloat16},
        head_dims=range(8, 129, 8),
        biases={Causal("top-left")},
        backward=Backward(),
        compile=True,
        min_compute_capability=(8, 0),
    ),
    layout="heads-first",
    calls_sdpa=False,
    refuse=refuse,
    probe=probe,
    costs={"cuda": Cost(call=25e-6, pair_dim=7e-15, pair=0.2e-12, token_dim=1e-12)},
    skips={Causal},
)
