"""FLOPs of attention, for torch's counter.

    with FlopCounterMode(custom_mapping=flops.formulas()) as counter:
        attention(query, key, value, Window(64, 64))

torch counts by op, and has no formula for two that attention runs on a CPU: its own FlashAttention there, and the op of
`torch/tiled`. Those that it has for the ops of `torch/fa-window` and `torch/varlen` on CUDA take heads for tokens where
no sequences are packed, and raise an error for pages.

Counted are the matrix products, as torch counts those of its kernels on CUDA: two in the forward and five in the
backward. A dense op counts all pairs, whatever its mask; packed sequences count each its own; `torch/tiled` counts
those that the mask leaves.

Nothing here is imported with attn_core, and torch is told nothing until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .torch_kernels import varlen
from .torch_kernels.tiling import traced
from .torch_kernels.tiling.written import NOTHING

Formula = Callable[..., int]


def formulas() -> dict[Any, Formula]:
    """Formulas by op, as FlopCounterMode's `custom_mapping` takes them."""
    return _of_the_cpu() | _of_cuda()


def register() -> None:
    """Makes torch's counter know them wherever it is used: in every FlopCounterMode that is made from now on.

    Twice is once. An op of the CPU that torch has a formula for keeps torch's.
    """
    from torch.utils.flop_counter import flop_registry

    for op, formula in _of_the_cpu().items():
        flop_registry.setdefault(op, formula)
    flop_registry.update(_of_cuda())


def _of_the_cpu() -> dict[Any, Formula]:
    aten, own = torch.ops.aten, torch.ops.attn_core
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _dense,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _dense_backward,
        own.tiled: _tiled,
        own.tiled_backward: _tiled_backward,
    }


def _of_cuda() -> dict[Any, Formula]:
    aten = torch.ops.aten
    found = {aten._flash_attention_forward: _flash, aten._flash_attention_backward: _flash_backward}
    if find_spec(varlen.MODULE) is not None:
        import_module(varlen.MODULE)  # its ops are known then
        found[torch.ops.torch_attn._varlen_attn] = _varlen
    return found


def _raw(formula: Formula) -> Formula:
    """Marks a formula that is given the tensors themselves, as the counter looks for it."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _forward(pairs: float, head_dim: int, head_dim_v: int) -> int:
    """Logits, and the sum of values; of so many pairs in all batch entries and heads."""
    return int(2 * pairs * (head_dim + head_dim_v))


def _backward(pairs: float, head_dim: int, head_dim_v: int) -> int:
    """Logits once more, and the gradients of weights, value, query and key."""
    return int(2 * pairs * (3 * head_dim + 2 * head_dim_v))


# Heads-first operands


@_raw
def _dense(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return _forward(_pairs(query, key), query.shape[-1], value.shape[-1])


@_raw
def _dense_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return _backward(_pairs(query, key), query.shape[-1], value.shape[-1])


def _pairs(query: Tensor, key: Tensor, held: Sequence[Tensor] = (), text: str = NOTHING) -> float:
    batch, heads, seqlen_q, _ = query.shape
    bias = traced.bias_of(text, held, query, key)
    return batch * heads * (seqlen_q * key.shape[2] if bias is None else bias.pairs())


@_raw
def _tiled(query: Tensor, key: Tensor, value: Tensor, held: list[Tensor], bias: str, *rest: Any, **options: Any) -> int:
    return _forward(_pairs(query, key, held, bias), query.shape[-1], value.shape[-1])


@_raw
def _tiled_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    wanted: list[bool],
    bias: str,
    *rest: Any,
    **options: Any,
) -> int:
    return _backward(_pairs(query, key, held, bias), query.shape[-1], value.shape[-1])


# Heads-last operands, or sequences packed behind each other


@_raw
def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor | None,
    starts_kv: Tensor | None,
    max_q: int,
    max_kv: int,
    *rest: Any,
    seqused_k: Tensor | None = None,
    **options: Any,
) -> int:
    pairs = _pairs_told(query, key, starts_q, starts_kv, seqused_k, max_q, max_kv)
    return _forward(pairs, query.shape[-1], value.shape[-1])


@_raw
def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor | None,
    starts_kv: Tensor | None,
    max_q: int,
    max_kv: int,
    *rest: Any,
    **options: Any,
) -> int:
    pairs = _pairs_told(query, key, starts_q, starts_kv, None, max_q, max_kv)
    return _backward(pairs, query.shape[-1], value.shape[-1])


@_raw
def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_kv: Tensor | None,
    max_q: int,
    max_kv: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> int:
    pairs = _pairs_told(query, key, starts_q, starts_kv, seqused_k, max_q, max_kv)
    return _forward(pairs, query.shape[-1], value.shape[-1])


def _pairs_told(
    query: Tensor,
    key: Tensor,
    starts_q: Tensor | None,
    starts_kv: Tensor | None,
    used_kv: Tensor | None,
    max_q: int,
    max_kv: int,
) -> float:
    if starts_q is None:
        batch, seqlen_q, heads, _ = query.shape
        return batch * heads * seqlen_q * key.shape[1]
    if type(starts_q) is not Tensor or starts_q.is_meta:  # it has no values: each may be as long as the longest
        return query.shape[1] * (starts_q.shape[0] - 1) * max_q * max_kv
    keys = (starts_q if starts_kv is None else starts_kv).diff() if used_kv is None else used_kv
    return query.shape[1] * float((starts_q.diff().long() * keys.long()).sum())
