"""Operands for a described problem: random, seeded, in the layouts that models produce.

inputs = build(problem, seed=0, layout="packed")
attention(inputs.query, inputs.key, inputs.value, inputs.bias, **inputs.options)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..bias import AttnBias, Cached, KeyPadding, Paged, TensorBias
from ..bias.joint import Joint
from ..problem import Problem

Layout = Literal["contiguous", "heads-first", "packed"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "heads-first", "packed")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors of one call, heads-last, and the gradients that are fed back into its results."""

    query: Tensor  #: `[batch, seqlen_q, num_heads, head_dim]`
    key: Tensor  #: `[batch, seqlen_kv, num_kv_heads, head_dim]`
    value: Tensor  #: `[batch, seqlen_kv, num_kv_heads, head_dim_v]`
    bias: AttnBias | None
    grad_out: Tensor  #: `[batch, seqlen_q, num_heads, head_dim_v]`
    grad_lse: Tensor | None  #: `[batch, num_heads, seqlen_q]`; None where no LSE is asked for
    options: dict[str, Any]  #: scale, and softcap, dropout_p and return_lse where they are used


def build(
    problem: Problem,
    *,
    seed: int,
    layout: Layout = "contiguous",
    magnitude: float = 1.0,
    empty_rows: bool = False,
    bias: AttnBias | None = None,
) -> Inputs:
    """Operands that ask `problem`.

    Args:
        problem: the tensors of its bias have shapes and dtypes only (meta); they are filled here.
            `strided_head_dim` gives every operand a strided last dimension, and then `layout` does not count. With
            Paged, key and value are pages, some of them shared; `pool_of` says how many.
        seed: the same seed gives the same numbers on every machine.
        layout: "contiguous"; "heads-first": stored `[batch, num_heads, seqlen, head_dim]`; "packed": slices of wider
            tensors, as a fused projection gives them.
        magnitude: standard deviation of query and key; the logits grow with its square.
        empty_rows: mask every key for the first query (in a tensor bias) or batch entry (in a key padding).
        bias: use this one instead of filling the problem's.

    Raises TypeError for a bias of a kind unknown here that holds integers; give it by `bias`.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if problem.dtype is torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide).to(problem.dtype)

    p = problem
    query_shape = (p.batch, p.seqlen_q, p.num_heads, p.head_dim)
    pages = (bias if bias is not None else p.bias).paged if p.in_pages else None  # type: ignore[union-attr]
    rows = (p.batch, p.seqlen_kv) if pages is None else (pool_of(pages), pages.page_size)
    key_shape, value_shape = (*rows, p.num_kv_heads, p.head_dim), (*rows, p.num_kv_heads, p.head_dim_v)
    query, key, value = normal(*query_shape) * magnitude, normal(*key_shape) * magnitude, normal(*value_shape)
    if p.strided_head_dim:
        query, key, value = (_strided(x) for x in (query, key, value))
    elif layout == "heads-first":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    elif layout == "packed":
        query = torch.stack([query, query], 2)[:, :, 1]
        both = torch.cat([key, value], -1)
        key, value = both[..., : p.head_dim], both[..., p.head_dim :]
    query, key, value = (x.to(p.device).detach().requires_grad_(p.requires_grad) for x in (query, key, value))

    if bias is None and p.bias is not None:
        bias = _filled(p.bias.bind(p.seqlen_q, p.seqlen_kv), generator, empty_rows)
    options: dict[str, Any] = {"scale": p.scale}
    if p.softcap is not None:
        options["softcap"] = p.softcap
    if p.dropout_p:
        options["dropout_p"] = p.dropout_p
    if p.return_lse:
        options["return_lse"] = True
    grad_lse = torch.randn(p.batch, p.num_heads, p.seqlen_q, generator=generator, dtype=wide)
    return Inputs(
        query=query,
        key=key,
        value=value,
        bias=_moved(bias, p.device),
        grad_out=normal(p.batch, p.seqlen_q, p.num_heads, p.head_dim_v).to(p.device),
        grad_lse=grad_lse.to(p.device) if p.return_lse else None,
        options=options,
    )


def pool_of(bias: Paged) -> int:
    """So many pages are made for a table: each sequence has its own order of most of them."""
    batch, max_pages = bias.page_table.shape
    return max_pages + batch


def _strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def _filled(bias: AttnBias, generator: torch.Generator, empty_rows: bool) -> AttnBias:
    """The bias with numbers in its tensors."""
    if isinstance(bias, Joint):
        parts = [_filled(part, generator, empty_rows) for part in bias.parts]
        return type(bias)(tuple(parts), bias.lengths)  # type: ignore[call-arg]
    if isinstance(bias, KeyPadding):
        seqlens = torch.randint(0, bias.bound_lengths()[1] + 1, bias.seqlens.shape, generator=generator)
        if empty_rows and seqlens.numel():
            seqlens[0] = 0
        return bias.with_held({"seqlens": seqlens.to(bias.seqlens.dtype)})
    if isinstance(bias, (Cached, Paged)):
        seqlens = torch.randint(0, bias.bound_lengths()[1] + 1, bias.seqlens_kv.shape, generator=generator)
        if empty_rows and seqlens.numel():
            seqlens[0] = 0
        held = {"seqlens_kv": seqlens.to(bias.seqlens_kv.dtype)}
        if isinstance(bias, Paged):
            pool, (batch, max_pages) = pool_of(bias), bias.page_table.shape
            table = torch.rand(batch, pool, generator=generator).argsort(1)[:, :max_pages]
            behind = torch.arange(max_pages) * bias.page_size >= seqlens[:, None]
            held["page_table"] = table.masked_fill(behind, -1).to(bias.page_table.dtype)
        return bias.with_held(held)
    if isinstance(bias, TensorBias):
        return bias.with_held({"tensor": _dense(bias.tensor, generator, empty_rows)})
    held = bias.held()
    if not all(tensor.is_floating_point() for tensor in held.values()):
        raise TypeError(f"build: no rule to fill a {type(bias).__name__}; give one with bias=")
    return bias.with_held({name: _normal(tensor, generator) for name, tensor in held.items()})


def _dense(like: Tensor, generator: torch.Generator, empty_rows: bool) -> Tensor:
    keep = torch.rand(like.shape, generator=generator) > 0.2
    if empty_rows and keep.numel():
        (keep[..., 0, :] if keep.ndim > 1 else keep)[...] = False
    if like.dtype is torch.bool:
        return keep
    return _normal(like, generator).detach().masked_fill(~keep, float("-inf")).requires_grad_(like.requires_grad)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype).requires_grad_(like.requires_grad)


def _moved(bias: AttnBias | None, device: str) -> AttnBias | None:
    if bias is None or bias.device is None or bias.device.type == device:
        return bias
    held = bias.held().items()
    return bias.with_held({name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in held})
