"""Operands as xFormers' operators take them.

Their layout is ours, `[batch, seqlen, num_heads, head_dim]`, but for

- documents and lengths of keys: batch entries lie behind each other, `[1, batch * seqlen, ...]`;
- GQA: five dimensions, `[batch, seqlen, num_kv_heads, group, head_dim]`, in which keys and values are expanded along
  `group` with a stride of 0;
- a tensor bias: expanded to the full shape, of the operands' dtype, its rows a multiple of 8 elements apart;
- strides: all but the last are multiples of 16 bytes, else the operand is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from attn_core import TensorBias
from attn_core.torch_kernels.dense import additive, of_rank_four
from torch import Tensor
from torch.nn.functional import pad

from .. import library
from . import forms

#: Rows of a bias are this many elements apart, or a multiple.
ALIGNED = 8
#: Bytes that a load of an operand takes at once.
LOAD = 16


@dataclass(frozen=True)
class Sent:
    """What is handed to xFormers."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Any


def sent(query: Tensor, key: Tensor, value: Tensor, form: forms.Form) -> Sent:
    """Our operands, heads-last, in xFormers' shapes, with the bias object of `form`. Raises what `form.made` raises."""
    heads, kv_heads = query.shape[2], key.shape[2]
    attn_bias = form.made(query.device) if form.tensor is None else with_tensor(form, query, key, heads // kv_heads)
    query, key, value = (aligned(tensor) for tensor in (query, key, value))
    if form.packed:
        query, key, value = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (query, key, value))
    if kv_heads != heads:
        query = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, query.shape[3])
        key, value = (
            tensor.unsqueeze(3).expand(*tensor.shape[:3], heads // kv_heads, tensor.shape[3]) for tensor in (key, value)
        )
    return Sent(query, key, value, attn_bias)


def with_tensor(form: forms.Form, query: Tensor, key: Tensor, group: int) -> Any:
    assert form.tensor is not None
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    tensor = expanded(form.tensor, query.dtype, shape)
    if group > 1:
        tensor = tensor.reshape(shape[0], shape[1] // group, group, *shape[2:])
    return tensor if form.kind == forms.TENSOR else beside_causal(tensor)


def beside_causal(tensor: Tensor) -> Any:
    """xFormers' causal mask from the top left, and a tensor."""
    return library.attn_bias().LowerTriangularMaskWithTensorBias(tensor)


def expanded(bias: TensorBias, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """`[batch, num_heads, seqlen_q, seqlen_kv]` of `dtype`; what broadcasts has a stride of 0, and rows are padded."""
    tensor = of_rank_four(additive(bias, dtype))
    seqlen_kv = shape[3]
    if tensor.shape[3] != seqlen_kv:
        tensor = tensor.expand(*tensor.shape[:3], seqlen_kv)
    rest = -seqlen_kv % ALIGNED
    tensor = pad(tensor, (0, rest)).narrow(3, 0, seqlen_kv) if rest else tensor.contiguous()
    return tensor.expand(shape)


def aligned(tensor: Tensor) -> Tensor:
    """Itself where every row can be loaded as those of a contiguous tensor can, else a copy."""
    size = tensor.element_size()
    load = math.gcd(LOAD, tensor.shape[3] * size)
    fits = tensor.stride(3) == 1 or tensor.shape[3] == 1
    fits = fits and all(tensor.stride(i) * size % load == 0 or tensor.shape[i] == 1 for i in range(3))
    return tensor if fits and tensor.data_ptr() % load == 0 else tensor.clone(memory_format=torch.contiguous_format)
