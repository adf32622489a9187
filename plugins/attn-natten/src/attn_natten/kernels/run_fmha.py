"""Runs NATTEN's dense attention. Imports it: this module is imported when one of its kernels is first chosen.

NATTEN gives the LSE heads-last. Documents are packed into one batch entry, so that of several are laid behind each
other, each with its own copy of the documents.
"""

from __future__ import annotations

from typing import Any

from attn_core import AttnBias, Segments
from torch import Tensor

from .. import library
from . import splits
from .documents import offsets

_attention: Any = library.NATTEN.module().attention


def cutlass(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("cutlass-fmha", query, key, value, bias, scale, return_lse)


def hopper(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("hopper-fmha", query, key, value, bias, scale, return_lse)


def blackwell(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    return _run("blackwell-fmha", query, key, value, bias, scale, return_lse)


def flex(query: Tensor, key: Tensor, value: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`. Not fused: NATTEN itself advises against compiling it."""
    if not query.is_cuda:  # FlexAttention refuses there what requires a gradient, even under no_grad
        query, key, value = query.detach(), key.detach(), value.detach()
    return _run("flex-fmha", query, key, value, None, scale, return_lse)


def _run(
    backend: str, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, scale: float, return_lse: bool
) -> Any:
    batch, seqlen_q = query.shape[:2]
    options: dict[str, Any] = {}
    if isinstance(bias, Segments):
        of_q, of_kv, longest_q, longest_kv = offsets(bias, batch, query.device)
        options = {
            "cumulative_seqlen_Q": of_q,
            "cumulative_seqlen_KV": of_kv,
            "max_seqlen_Q": longest_q,
            "max_seqlen_KV": longest_kv,
        }
        query, key, value = (tensor.flatten(0, 1)[None] for tensor in (query, key, value))
        if bias.within is not None:
            options["is_causal"] = True
    elif bias is not None:
        options["is_causal"] = True  # left out where it is not: before 0.21.5 there is no such argument
    options |= splits.of_fmha(backend, (key.shape[1],), key.shape[0], query.shape[2])
    if return_lse:
        options["return_lse"] = True
    result = _attention(query=query, key=key, value=value, scale=scale, backend=backend, **options)
    out, lse = result if return_lse else (result, None)
    if isinstance(bias, Segments):
        out = out.reshape(batch, seqlen_q, *out.shape[2:])
    if lse is None:
        return out
    if isinstance(bias, Segments):
        lse = lse.reshape(batch, seqlen_q, lse.shape[2])
    return out, lse.transpose(1, 2)
