"""The five functions of FA2's extension with their arguments by name (there they have none), and operands for them."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HALF = torch.float16


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def longest(cu: list[int]) -> int:
    return max(b - a for a, b in pairwise(cu))


class Extension:
    """The functions of a module that is laid out like `flash_attn_2_cuda`."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: Tensor | None = None,
        slopes: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
        causal: bool = False,
        left: int = -1,
        right: int = -1,
        softcap: float = 0.0,
        weights: bool = False,
    ) -> list[Tensor]:
        """out, LSE, weights marked by dropout, and its state."""
        rules = (scaled(q, scale), causal, left, right, softcap)
        return self.module.fwd(q, k, v, out, slopes, p, *rules, weights, None)

    def bwd(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        into: tuple[Tensor | None, ...] = (None, None, None),
        slopes: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
        causal: bool = False,
        left: int = -1,
        right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        state: Tensor | None = None,
    ) -> list[Tensor]:
        """dq, dk and dv."""
        rules = (p, scaled(q, scale), causal, left, right, softcap, deterministic)
        return self.module.bwd(dout, q, k, v, out, lse, *into, slopes, *rules, None, state)[:3]

    def varlen_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: list[int],
        cu_k: list[int],
        *,
        out: Tensor | None = None,
        used: Tensor | None = None,
        leftpad: Tensor | None = None,
        table: Tensor | None = None,
        slopes: Tensor | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
        p: float = 0.0,
        scale: float | None = None,
        zero: bool = False,
        causal: bool = False,
        left: int = -1,
        right: int = -1,
        softcap: float = 0.0,
        weights: bool = False,
    ) -> list[Tensor]:
        """out, LSE, weights marked by dropout, and its state."""
        most = (longest(cu_q) if max_q is None else max_q, longest(cu_k) if max_k is None else max_k)
        rules = (p, scaled(q, scale), zero, causal, left, right, softcap)
        lengths = (int32(cu_q), int32(cu_k), used, leftpad, table)
        return self.module.varlen_fwd(q, k, v, out, *lengths, slopes, *most, *rules, weights, None)

    def varlen_bwd(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: list[int],
        cu_k: list[int],
        *,
        slopes: Tensor | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
        p: float = 0.0,
        scale: float | None = None,
        zero: bool = False,
        causal: bool = False,
        left: int = -1,
        right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        state: Tensor | None = None,
    ) -> list[Tensor]:
        """dq, dk and dv."""
        most = (longest(cu_q) if max_q is None else max_q, longest(cu_k) if max_k is None else max_k)
        rules = (p, scaled(q, scale), zero, causal, left, right, softcap, deterministic)
        lengths = (int32(cu_q), int32(cu_k))
        given = (dout, q, k, v, out, lse, None, None, None, *lengths, slopes, *most, *rules, None, state)
        return self.module.varlen_bwd(*given)[:3]

    def fwd_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        k: Tensor | None = None,
        v: Tensor | None = None,
        seqlens: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        entries: Tensor | None = None,
        leftpad: Tensor | None = None,
        table: Tensor | None = None,
        slopes: Tensor | None = None,
        out: Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
        left: int = -1,
        right: int = -1,
        softcap: float = 0.0,
    ) -> list[Tensor]:
        """out and LSE."""
        cache = (k_cache, v_cache, k, v, seqlens, cos, sin, entries, leftpad, table)
        rules = (scaled(q, scale), causal, left, right, softcap)
        return self.module.fwd_kvcache(q, *cache, slopes, out, *rules, True, 0)


def scaled(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def randn(*shape, seed=0, dtype=HALF):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape) + shape[0])).to(dtype)


def operands(batch, seqlen_q, seqlen_k, heads=4, heads_k=2, head_dim=16, seed=0, dtype=HALF):
    shapes = ((batch, seqlen_q, heads, head_dim), *((batch, seqlen_k, heads_k, head_dim),) * 2)
    return [randn(*shape, seed=seed + n, dtype=dtype) for n, shape in enumerate(shapes)]
