"""Dense biases as torch's kernels want them: additive, in a dtype that they take, without losing what a value means."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bias import TensorBias

MASKED = float("-inf")
HALF = frozenset({torch.float16, torch.bfloat16})


def additive(bias: TensorBias, dtype: torch.dtype) -> Tensor:
    """The bias as a floating tensor of `dtype`, of the rank of attention's logits or lower.

    Boolean: 0 where a key may be attended, else -inf. A finite value stays finite: `finfo.min` of a wider dtype is a
    large negative number, not a mask, and must not become -inf by the cast.
    """
    tensor = bias.tensor
    if tensor.dtype is torch.bool:
        return torch.where(tensor, torch.zeros((), dtype=dtype, device=tensor.device), MASKED)
    if tensor.dtype is dtype:
        return tensor
    info = torch.finfo(dtype)
    if torch.finfo(tensor.dtype).max <= info.max:
        return tensor.to(dtype)
    return torch.where(tensor == MASKED, MASKED, tensor.clamp(info.min, info.max)).to(dtype)


def beside(bias: TensorBias, dtype: torch.dtype) -> Tensor:
    """The bias as a floating tensor for operands of `dtype`: of the same, or of float32 beside half precision, so that
    what is wider than the operands keeps its precision."""
    return additive(bias, torch.float32 if dtype in HALF and bias.tensor.dtype is not dtype else dtype)


def of_rank_four(tensor: Tensor) -> Tensor:
    """`[batch, num_heads, seqlen_q, seqlen_kv]`, with sizes of 1 where the bias has fewer dimensions."""
    return tensor if tensor.ndim == 4 else tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def empty_rows(tensor: Tensor) -> Tensor:
    """`[…, seqlen_q]`: True where an additive bias masks every key of a query."""
    return (tensor == MASKED).all(-1)
