"""Runs NATTEN's neighborhood attention. Imports it: this module is imported when one of its kernels is first chosen.

NATTEN takes the tokens in their grid, `[batch, *extents, num_heads, head_dim]`, and gives the LSE heads-last. All is
passed by keyword: the fifth position was the dilation until 0.17, and is the stride since 0.20.
"""

from __future__ import annotations

from typing import Any

from attn_core import AttnBias
from torch import Tensor

from .. import library
from ..autotuner.natten_tiles import chosen_options
from . import splits
from .windows import axes_of

_natten: Any = library.NATTEN.module()
_FUNCTIONS = {1: _natten.na1d, 2: _natten.na2d, 3: _natten.na3d}


def cutlass(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("cutlass", query, key, value, bias, scale, return_lse)


def hopper(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("hopper", query, key, value, bias, scale, return_lse)


def blackwell(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("blackwell", query, key, value, bias, scale, return_lse)


def flex(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`. Not fused: NATTEN itself advises against compiling it."""
    if not query.is_cuda:  # FlexAttention refuses there what requires a gradient, even under no_grad
        query, key, value = query.detach(), key.detach(), value.detach()
    return _run("flex", query, key, value, bias, scale, return_lse)


def _run(
    family: str, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, scale: float, return_lse: bool
) -> Any:
    axes = axes_of(bias, query.shape[1])
    extents, kernel_size, stride, dilation, is_causal = zip(*axes)
    operands = {
        name: tensor.reshape(tensor.shape[0], *extents, *tensor.shape[2:])
        for name, tensor in (("query", query), ("key", key), ("value", value))
    }
    batch, _, num_heads, _ = query.shape
    dense = {"backend": f"{family}-fmha", **splits.of_fmha(f"{family}-fmha", extents, batch, num_heads)}
    result = _FUNCTIONS[len(axes)](
        **operands,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        backend=f"{family}-fna",
        attention_kwargs=dense,  # what a window over the whole sequence is handed to
        **{**splits.of_fna(f"{family}-fna", extents, dilation, batch, num_heads), **chosen_options()},
        **({"return_lse": True} if return_lse else {}),  # before 0.21.5 there is no such argument
    )
    if not return_lse:
        return result.flatten(1, len(axes))
    out, lse = result
    return out.flatten(1, len(axes)), lse.flatten(1, len(axes)).transpose(1, 2)
