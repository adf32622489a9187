"""merge(): joins attention over parts of the keys into attention over all of them.

With out_i and lse_i of each part, in float32 (float64 for a float64 LSE):

    m = max(lse_i),    w_i = exp(lse_i - m),    out = sum(w_i out_i) / sum(w_i),    lse = m + log(sum(w_i))

A part in which a query has no key (lse -inf) has weight 0, whatever its out holds. Where that is so in every part, out
is 0 and lse -inf, as in attention itself. (The rule of split and ring attention: Liu et al., arXiv:2310.01889.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError, InputTypeError

EMPTY = float("-inf")


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over disjoint parts of them; differentiable in every `out` and `lse`.

    Args:
        outs: one `[batch, seqlen_q, num_heads, head_dim_v]` per part, of one dtype.
        lses: as many `[batch, num_heads, seqlen_q]`, natural log. +inf (as FlashAttention-2 says of a query without
            keys) counts as -inf.

    Returns:
        `(out, lse)` of the same shapes; `out` in the dtype of `outs`, `lse` in that of `lses`.

    Raises:
        InputError: no parts, as many outs as lses are not given, or shapes or devices that do not agree.
        InputTypeError: what is no sequence of tensors, dtypes that do not agree or are not floating.
    """
    _check(outs, lses)
    compute = torch.float64 if lses[0].dtype is torch.float64 else torch.float32
    stacked = torch.stack([lse.to(compute) for lse in lses])  # [part, batch, num_heads, seqlen_q]
    stacked = stacked.masked_fill(stacked == -EMPTY, EMPTY)
    highest = stacked.detach().amax(0)
    highest = highest.masked_fill(highest == EMPTY, 0.0)
    weights = torch.exp(stacked - highest)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + total.log()).masked_fill(empty, EMPTY)
    shares = (weights / total).transpose(-1, -2).unsqueeze(-1)  # [part, batch, seqlen_q, num_heads, 1]
    out = torch.zeros_like(outs[0], dtype=compute)
    for part, share in zip(outs, shares):
        out = out + share * part.to(compute).masked_fill(share == 0, 0.0)  # what an empty part holds may be NaN
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, Sequence):
            raise InputTypeError(f"merge: {name} must be a list or tuple of tensors, got {type(given).__name__}")
    if not outs or len(outs) != len(lses):
        raise InputError(f"merge: takes as many outs as lses, at least one, got {len(outs)} and {len(lses)}")
    for name, tensors in (("outs", outs), ("lses", lses)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InputTypeError(f"merge: {name}[{i}] must be a floating tensor, got {got}")
            if tensor.dtype is not tensors[0].dtype:
                raise InputTypeError(f"merge: {name}[{i}] must have the dtype {tensors[0].dtype}, got {tensor.dtype}")
            if tensor.shape != tensors[0].shape or tensor.device != outs[0].device:
                raise InputError(
                    f"merge: {name}[{i}] must be {list(tensors[0].shape)} on {outs[0].device},"
                    f" got {list(tensor.shape)} on {tensor.device}"
                )
    if outs[0].ndim != 4:
        raise InputError(f"merge: outs must be [batch, seqlen_q, num_heads, head_dim_v], got {list(outs[0].shape)}")
    batch, seqlen_q, num_heads, _ = outs[0].shape
    if tuple(lses[0].shape) != (batch, num_heads, seqlen_q):
        want = f"[batch={batch}, num_heads={num_heads}, seqlen_q={seqlen_q}]"
        raise InputError(f"merge: lses must be {want}, got {list(lses[0].shape)}")
