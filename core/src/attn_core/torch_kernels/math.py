"""torch/math: attention from plain matrix products; any device, every derivative, quadratic memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal, TensorBias
from ..capabilities import ANY_DEVICE, ANY_DIM, Backward, Capabilities
from ..cost import Cost
from ..kernel import Kernel
from .dense import beside
from .measured import MEASURED

_math = torch._scaled_dot_product_attention_math


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
    mask = beside(bias, query.dtype) if isinstance(bias, TensorBias) else None  # the op would add True as 1.0
    causal = mask is None and bias is not None
    gqa = query.shape[1] != key.shape[1]
    return _math(query, key, value, mask, dropout_p, causal, None, scale=scale, enable_gqa=gqa)[0]


KERNEL = Kernel(
    name="torch/math",
    run=run,
    capabilities=Capabilities(
        devices=ANY_DEVICE,
        dtypes={torch.float32, torch.float64, torch.float16, torch.bfloat16},
        head_dims=ANY_DIM,
        head_dims_v=ANY_DIM,
        biases={Causal("top-left"), TensorBias},
        backward=Backward(bias_grad=True, deterministic=True, double=True),
        gqa=True,
        dropout=True,
        deterministic=True,
        forward_ad=True,
        compile=True,
        strided_head_dim=True,
        empty_lengths=True,
    ),
    layout="heads-first",
    calls_sdpa=False,
    costs={
        "cpu": Cost(
            call=8.83e-05,
            pair_dim=3.99e-11,
            pair=4.87e-09,
            token_dim=1.03e-09,
            token=5.38e-08,
            mask=5.04e-10,
            element=3.98e-09,
            threads=1,
            with_backward=Cost(
                call=0.000497,
                pair_dim=1.14e-10,
                pair=7.8e-09,
                token_dim=2.99e-09,
                mask=1.16e-10,
                element=1.37e-08,
                backward=0.0,
                threads=1,
            ),
            source=MEASURED,
        ),
        "cuda": Cost(call=60e-6, pair_dim=40e-15, pair=16e-12, token_dim=2e-12, mask=6e-12),
        "*": Cost(call=60e-6, pair_dim=30e-12, pair=2e-9, token_dim=1e-9, mask=2e-9),
    },
)
