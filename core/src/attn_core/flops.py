"""FLOPs of attention, for torch's counter.

    with FlopCounterMode(custom_mapping=flops.formulas()) as counter:
        attention(query, key, value, Window(64, 64))

torch counts by op, and has no formula for two that attention runs on a CPU: its own FlashAttention there, and the op of
`torch/tiled`. Counted are the matrix products, as torch counts those of its kernels on CUDA: two in the forward and
five in the backward. A dense op counts all pairs, whatever its mask; `torch/tiled` those that the mask leaves.

Nothing here is imported with attn_core, and torch is told nothing until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .torch_kernels.tiling import (
    traced,
    traced_scores,  # noqa: F401  (importing it makes its ops known)
)

Formula = Callable[..., int]


def formulas() -> dict[Any, Formula]:
    """Formulas by op, as FlopCounterMode's `custom_mapping` takes them."""
    aten, own = torch.ops.aten, torch.ops.attn_core
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _dense,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _dense_backward,
        own.tiled: _tiled,
        own.tiled_backward: _tiled_backward,
        own.tiled_scores: _tiled_scores,
        own.tiled_scores_backward: _tiled_scores_backward,
    }


def register() -> None:
    """Makes torch's counter know them wherever it is used: in every FlopCounterMode that is made from now on.

    Twice is once. An op that torch has a formula for keeps torch's.
    """
    from torch.utils.flop_counter import flop_registry

    for op, formula in formulas().items():
        flop_registry.setdefault(op, formula)


def _raw(formula: Formula) -> Formula:
    """Marks a formula that is given the tensors themselves, as the counter looks for it."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _forward(query: Tensor, value: Tensor, pairs: float) -> int:
    """Of heads-first operands: logits, and the sum of values."""
    batch, heads, _, head_dim = query.shape
    return int(2 * batch * heads * pairs * (head_dim + value.shape[-1]))


def _backward(query: Tensor, value: Tensor, pairs: float) -> int:
    """Logits once more, and the gradients of weights, value, query and key."""
    batch, heads, _, head_dim = query.shape
    return int(2 * batch * heads * pairs * (3 * head_dim + 2 * value.shape[-1]))


def _pairs(query: Tensor, key: Tensor) -> int:
    return query.shape[2] * key.shape[2]


def _pairs_left(query: Tensor, key: Tensor, mask: str) -> float:
    read = traced.read(mask, (query.shape[2], key.shape[2]))
    return _pairs(query, key) if read is None else read.pairs()


@_raw
def _dense(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return _forward(query, value, _pairs(query, key))


@_raw
def _dense_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **options: Any
) -> int:
    return _backward(query, value, _pairs(query, key))


@_raw
def _tiled(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float, out_val: Any = None) -> int:
    return _forward(query, value, _pairs_left(query, key, mask))


@_raw
def _tiled_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: str,
    scale: float,
    out_val: Any = None,
) -> int:
    return _backward(query, value, _pairs_left(query, key, mask))


@_raw
def _tiled_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: list[Tensor],
    mask: str,
    scores: str,
    scale: float,
    out_val: Any = None,
) -> int:
    return _forward(query, value, _pairs_left(query, key, mask))


@_raw
def _tiled_scores_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    wanted: list[bool],
    mask: str,
    scores: str,
    scale: float,
    out_val: Any = None,
) -> int:
    return _backward(query, value, _pairs_left(query, key, mask))
