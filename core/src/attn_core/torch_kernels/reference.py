"""torch/reference: the float64 oracle as a kernel. Takes every legal problem, so that there is always an answer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Cached, Intersection, KeyPadding, Sum
from ..capabilities import ANY_DEVICE, ANY_DIM, Backward, Capabilities
from ..cost import Cost
from ..kernel import Kernel
from ..reference import reference_attention
from ..tracing import constant
from . import by_rule
from .measured import MEASURED


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    operands = (query, key, value)
    if not has_float64(query.device.type):  # float64 is what makes it the reference: computed on the CPU instead
        operands = tuple(tensor.cpu() for tensor in operands)  # type: ignore[assignment]
    out, lse = reference_attention(*operands, bias, scale=scale, softcap=softcap, dropout_p=dropout_p)
    out = out.to(query.device, query.dtype)
    if not return_lse:
        return out
    return out, lse.to(query.device, torch.float64 if query.dtype is torch.float64 else torch.float32)


@constant
def has_float64(device: str) -> bool:
    """Whether the device computes in float64 (Apple's GPUs do not)."""
    return device in ("cpu", "cuda", "meta") or _computes_float64(device)


@functools.cache
def _computes_float64(device: str) -> bool:
    try:
        probe = torch.ones(2, 2, dtype=torch.float64, device=device)
        return bool(torch.isfinite(probe @ probe).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


KERNEL = Kernel(
    name="torch/reference",
    run=run,
    capabilities=Capabilities(
        devices=ANY_DEVICE,
        dtypes={torch.float32, torch.float64, torch.float16, torch.bfloat16},
        head_dims=ANY_DIM,
        head_dims_v=ANY_DIM,
        biases={AttnBias, Cached, Intersection, KeyPadding, Sum},
        backward=Backward(bias_grad=True, lse_grad=True, deterministic=True, double=True),
        gqa=True,
        softcap=True,
        dropout=True,
        return_lse=True,
        deterministic=True,
        forward_ad=True,
        compile=True,
        strided_head_dim=True,
        empty_lengths=True,
    ),
    costs={
        "cpu": Cost(
            call=0.000453,
            pair_dim=3.63e-11,
            pair=1.54e-08,
            token_dim=4.02e-09,
            token=1.39e-07,
            element=2.67e-08,
            added=1e-08,
            threads=1,
            with_backward=Cost(
                call=0.000929,
                pair_dim=4.49e-10,
                pair=1.9e-08,
                token_dim=9.58e-09,
                token=7.4e-07,
                added=3e-08,
                backward=0.0,
                threads=1,
            ),
            source=MEASURED,
        ),
        "cuda": Cost(call=400e-6, pair_dim=400e-15, pair=100e-12, token_dim=20e-12, mask=20e-12),
        "*": Cost(call=400e-6, pair_dim=150e-12, pair=30e-9, token_dim=5e-9, mask=6e-9),
    },
    work=by_rule.work,
)
