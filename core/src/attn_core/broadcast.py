"""Any leading dimensions: brings what scaled_dot_product_attention takes to the four dimensions of a problem.

torch broadcasts all dimensions but the last two: two or three dimensions, windows in a fifth, one key head or one
batch entry for many. What reaches a kernel is `[batch, num_heads, seqlen, head_dim]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .bias import TensorBias
from .errors import InputError

Fold = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor, Any]]
Unfold = Callable[[Any], Any]


def broadcasting(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Fold, Unfold] | None:
    """(fold, unfold) for operands of these shapes, or None where they are four-dimensional and agree already.

    Raises InputError for shapes that torch refuses as well.
    """
    if query.ndim == key.ndim == value.ndim == 4:
        batches = query.shape[0] == key.shape[0] == value.shape[0]
        heads = query.shape[1] == key.shape[1] == value.shape[1]
        if batches and (heads or (enable_gqa and key.shape[1] == value.shape[1])):
            return None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim < 2:
            raise InputError(f"{name}: must be [..., seqlen, head_dim], got shape {list(tensor.shape)}")
    shapes = [_leading(tensor) for tensor in (query, key, value)]
    lead = _broadcast(*(shape[:-1] for shape in shapes))
    if lead is None:
        raise InputError(
            "query, key, value: leading dimensions must broadcast, got"
            f" {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    q_heads, k_heads, v_heads = _heads(shapes[0][-1], shapes[1][-1], shapes[2][-1], enable_gqa)
    rank = max(query.ndim, key.ndim, value.ndim)

    def fold(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        folded = [
            _folded(tensor, lead, heads) for tensor, heads in ((query, q_heads), (key, k_heads), (value, v_heads))
        ]
        if isinstance(bias, TensorBias):
            bias = TensorBias(_folded_bias(bias.tensor, lead))
        return folded[0], folded[1], folded[2], bias

    def unfold(out: Any) -> Any:
        if isinstance(out, tuple):
            return tuple(map(unfold, out))
        shape = (*lead, *out.shape[1:])
        return out.reshape(shape[len(shape) - rank :] if rank < 4 else shape)

    return fold, unfold


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """torch.broadcast_shapes as arithmetic, which leaves no node in a traced graph; None where they do not fit."""
    rank = max(map(len, shapes))
    result = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes)):
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide):
            return None
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _leading(tensor: Tensor) -> tuple[int, ...]:
    """Every dimension but the last two; at least one, which is the heads'."""
    return tuple(tensor.shape[:-2]) or (1,)


def _heads(query: int, key: int, value: int, enable_gqa: bool) -> tuple[int, int, int]:
    """Heads of each operand after broadcasting; one key head for many query heads is what kernels know as MQA."""
    kv = max(key, value)
    if min(key, value) not in (1, kv):
        raise InputError(f"value: num_heads must be key's {key} (or one of them 1), got {value}")
    if query == kv or kv == 1 or (enable_gqa and kv and query % kv == 0):
        return query, kv, kv
    if query == 1:
        return kv, kv, kv
    hint = "" if enable_gqa else "; enable_gqa=True lets several query heads read one key head"
    raise InputError(f"key: num_heads must be query's {query}, or 1, got {kv}{hint}")


def _folded(tensor: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    while tensor.ndim < 3:
        tensor = tensor.unsqueeze(0)
    seqlen, dim = tensor.shape[-2:]
    return tensor.expand(*lead, heads, seqlen, dim).reshape(math.prod(lead), heads, seqlen, dim)


def _folded_bias(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    if tensor.ndim <= 3:  # at most [num_heads, seqlen_q, seqlen_kv]: the same for every leading index
        return tensor
    if math.prod(tensor.shape[:-3]) == 1:
        return tensor.reshape(tensor.shape[-3:])
    given = tensor.shape[:-3]
    if len(given) > len(lead) or any(n not in (1, size) for n, size in zip(reversed(given), reversed(lead))):
        wanted = ", ".join([*map(str, lead), "num_heads", "seqlen_q", "seqlen_kv"])
        raise InputError(f"attn_mask: shape {list(tensor.shape)} does not broadcast to [{wanted}]")
    return tensor.expand(*lead, *tensor.shape[-3:]).reshape(math.prod(lead), *tensor.shape[-3:])
