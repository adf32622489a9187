"""Random problems for hypothesis, which only this module needs.

Sizes are drawn from lists, not from ranges: the ends of what kernels distinguish (1, odd numbers, one more than a
tile, an empty length) come up as often as the middle.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from ..bias import (
    ALiBi,
    AttnBias,
    Cached,
    Causal,
    KeyPadding,
    Neighborhood,
    Paged,
    RelPosTable,
    Sum,
    TensorBias,
    Window,
)
from ..problem import Problem
from .problems import LAYOUTS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEQLENS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64)
HEADS = ((1, 1), (2, 2), (3, 3), (2, 1), (4, 2), (6, 2), (3, 1))
HEAD_DIMS = (1, 3, 8, 9, 16, 24, 32, 40, 64, 65, 72, 130, 257)
SCALES = (None, None, None, 1.0, 0.05, 0.0, -0.3)
SOFTCAPS = (None, None, None, 0.5, 3.0, 30.0)
#: Kinds whose sums are drawn; those of two masks are intersections.
PARTS = (Causal, Window, KeyPadding, Cached, Neighborhood, ALiBi, TensorBias)
KINDS = (
    *(None, None, Causal, Window, KeyPadding, Cached, Paged),
    *(TensorBias, TensorBias, Neighborhood, ALiBi, RelPosTable, Sum, Sum),
)
PAGE_SIZES = (1, 2, 4, 16)
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
        requires_grad=not draw(_one_in(3)),
        bias_requires_grad=bias_requires_grad,
        deterministic=draw(_one_in(6)),
        strided_head_dim=head_dim > 1 and draw(_one_in(6)),
    )


@st.composite
def biases(draw: Any, batch: int, num_heads: int, seqlen_q: int, seqlen_kv: int, dtype: torch.dtype) -> AttnBias | None:
    """No bias, or one of a random kind for these sizes; tensors are on the meta device, to be filled."""
    sizes = batch, num_heads, seqlen_q, seqlen_kv
    kind = draw(st.sampled_from(KINDS))
    if kind is Sum:
        parts = [kind for kind in PARTS if kind is not Neighborhood or seqlen_q == seqlen_kv > 0]
        first, second = draw(st.sampled_from((*parts, Paged))), draw(st.sampled_from(parts))  # one pool of pages
        added: AttnBias = draw(_of_kind(first, *sizes, dtype)) + draw(_of_kind(second, *sizes, dtype))
        return added
    if kind in (Neighborhood, RelPosTable) and not seqlen_q == seqlen_kv > 0:
        kind = ALiBi
    bias: AttnBias | None = None if kind is None else draw(_of_kind(kind, *sizes, dtype))
    return bias


@st.composite
def _of_kind(
    draw: Any, kind: Any, batch: int, num_heads: int, seqlen_q: int, seqlen_kv: int, dtype: torch.dtype
) -> AttnBias:
    corner = draw(st.sampled_from(CORNERS))
    if kind is Causal:
        return Causal(corner)
    if kind is Window:
        return Window(draw(st.sampled_from(LIMITS)), draw(st.sampled_from(LIMITS)), corner)
    if kind is KeyPadding:
        return KeyPadding(torch.empty(batch, dtype=torch.int64, device="meta"))
    if kind in (Cached, Paged):
        window = Window(draw(st.sampled_from(LIMITS)), draw(st.sampled_from(LIMITS)), corner)
        within = draw(st.sampled_from((None, Causal(corner), window)))
        seqlens = torch.empty(batch, dtype=torch.int64, device="meta")
        if kind is Cached:
            return Cached(seqlens, within=within)
        page_size = draw(st.sampled_from([size for size in PAGE_SIZES if seqlen_kv % size == 0]))
        table = torch.empty(batch, seqlen_kv // page_size, dtype=torch.int32, device="meta")
        return Paged(table, seqlens, page_size, within=within)
    if kind is Neighborhood:
        kernel = draw(st.integers(1, seqlen_q))
        stride, dilation = draw(st.integers(1, kernel)), draw(st.integers(1, seqlen_q // kernel))
        is_causal = draw(st.booleans())
        return Neighborhood(seqlen_q, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=is_causal)
    if kind is ALiBi:
        shape = draw(st.sampled_from((None, (num_heads,), (batch, num_heads))))
        return ALiBi(num_heads, None if shape is None else draw(_floating(shape, dtype)), corner)
    if kind is RelPosTable:
        reach = draw(st.integers(1, seqlen_q + 1))
        return RelPosTable(draw(_floating((num_heads, 2 * reach - 1), dtype)), seqlen_q, draw(st.sampled_from((1, 2))))
    assert kind is TensorBias
    full = (batch, num_heads, seqlen_q, seqlen_kv)
    rank = draw(st.sampled_from((4, 4, 3, 2)))
    shape = tuple(1 if draw(_one_in(4)) else size for size in full[4 - rank :])
    if draw(st.booleans()):
        return TensorBias(torch.empty(shape, dtype=torch.bool, device="meta"))
    return TensorBias(draw(_floating(shape, dtype)))


@st.composite
def _floating(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    chosen = torch.float32 if draw(_one_in(3)) else dtype
    return torch.empty(shape, dtype=chosen, device="meta", requires_grad=draw(st.booleans()))


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(LAYOUTS)
