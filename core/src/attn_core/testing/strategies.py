"""Random problems for hypothesis, which only this module needs.

Sizes are drawn from lists, not from ranges: the ends of what kernels distinguish (1, odd numbers, one more than a
tile, an empty length) come up as often as the middle.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from ..bias import AttnBias, Causal, KeyPadding, TensorBias, Window
from ..problem import Problem
from .problems import LAYOUTS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEQLENS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64)
HEADS = ((1, 1), (2, 2), (3, 3), (2, 1), (4, 2), (6, 2), (3, 1))
HEAD_DIMS = (1, 3, 8, 9, 16, 24, 32, 40, 64, 65, 72, 130, 257)
SCALES = (None, None, None, 1.0, 0.05, 0.0, -0.3)
SOFTCAPS = (None, None, None, 0.5, 3.0, 30.0)
KINDS = (None, None, Causal, Window, KeyPadding, TensorBias, TensorBias)
CORNERS = ("top-left", "bottom-right")
LIMITS = (None, 0, 1, 2, 4, 16)


def _one_in(n: int) -> st.SearchStrategy[bool]:
    return st.sampled_from([True] + [False] * (n - 1))


@st.composite
def problems(draw: Any, dropout: bool = True) -> Problem:
    """Legal problems on the CPU, small enough for a thousand of them; the bias is bound and normalized."""
    batch, seqlen_q, seqlen_kv = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(SEQLENS)), None
    if draw(_one_in(2)):
        seqlen_kv = draw(st.sampled_from(SEQLENS))
    empty = draw(st.sampled_from((None,) * 21 + ("batch", "seqlen_q", "seqlen_kv")))
    seqlen_kv = 0 if empty == "seqlen_kv" else seqlen_q if seqlen_kv is None else seqlen_kv
    seqlen_q, batch = (0 if empty == "seqlen_q" else seqlen_q), (0 if empty == "batch" else batch)
    num_heads, num_kv_heads = draw(st.sampled_from(HEADS))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    head_dim_v = draw(st.sampled_from(HEAD_DIMS)) if draw(_one_in(5)) else head_dim
    dtype = draw(st.sampled_from(DTYPES))
    bias = draw(biases(batch, num_heads, seqlen_q, seqlen_kv, dtype))
    normalized = None if bias is None else bias.bind(seqlen_q, seqlen_kv).normalize()
    scale = draw(st.sampled_from(SCALES))
    bias_requires_grad = normalized is not None and normalized.requires_grad
    return Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device="cpu",
        bias=normalized,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=draw(st.sampled_from(SOFTCAPS)),
        dropout_p=draw(st.sampled_from((0.1, 0.5))) if dropout and draw(_one_in(12)) else 0.0,
        return_lse=draw(_one_in(3)),
        requires_grad=not draw(_one_in(4)),
        bias_requires_grad=bias_requires_grad,
        deterministic=draw(_one_in(6)),
        strided_head_dim=head_dim > 1 and draw(_one_in(6)),
    )


@st.composite
def biases(draw: Any, batch: int, num_heads: int, seqlen_q: int, seqlen_kv: int, dtype: torch.dtype) -> AttnBias | None:
    """No bias, or one of a random kind for these sizes; tensors are on the meta device, to be filled."""
    kind = draw(st.sampled_from(KINDS))
    if kind is Causal:
        return Causal(draw(st.sampled_from(CORNERS)))
    if kind is Window:
        left, right = draw(st.sampled_from(LIMITS)), draw(st.sampled_from(LIMITS))
        return Window(left, right, draw(st.sampled_from(CORNERS)))
    if kind is KeyPadding:
        return KeyPadding(torch.empty(batch, dtype=torch.int64, device="meta"))
    if kind is TensorBias:
        full = (batch, num_heads, seqlen_q, seqlen_kv)
        rank = draw(st.sampled_from((4, 4, 3, 2)))
        shape = tuple(1 if draw(_one_in(4)) else size for size in full[4 - rank :])
        floating = torch.float32 if draw(_one_in(3)) else dtype
        tensor = torch.empty(shape, dtype=draw(st.sampled_from((torch.bool, floating))), device="meta")
        if tensor.dtype is not torch.bool and draw(_one_in(2)):
            tensor.requires_grad_()
        return TensorBias(tensor)
    return None


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(LAYOUTS)
