"""torch/varlen: `torch.nn.attention.varlen.varlen_attn`, on CUDA: sequences of their own lengths, in a row or in pages.

The op's backward knows no lengths, and leaves the gradient of what lies between sequences unwritten. So, where a
gradient is needed, keys that exist are put together before, in a copy; pages are for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Cached, KeyPadding, Paged, Segments
from ..bias.segments import band_of
from ..capabilities import Backward, Capabilities, Refusal
from ..cost import Cost
from ..kernel import Kernel, Unusable
from ..problem import Problem
from . import flash_limits
from .dense import HALF
from .packed import behind_each_other, flat, lse_of_entries, normalized, of_entries, packed, together

#: Arguments of the op below, which came with those of `varlen_attn` that are needed here.
NEEDED = frozenset({"window_size_left", "window_size_right", "seqused_k", "block_table"})
MODULE = "torch.nn.attention.varlen"
#: Pages hold a multiple of this many keys.
PAGE = 256


def run(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`; with Paged, key and value as the pages lie."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # half a second: it takes the counter of FLOPs along

    told = packed(bias, query, key)
    if told.pages is None:
        key, value = flat(key), flat(value)
        grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if told.used_kv is not None and grad:
            assert bias is not None
            key, value = together(key, value, bias.valid_keys(key.device), query.shape[0])
            told = behind_each_other(told)
    result: Any = varlen_attn(
        flat(query),
        key,
        value,
        told.starts_q,
        told.starts_kv,
        told.max_q,
        told.max_kv,
        return_aux=AuxRequest(lse=True) if return_lse else None,
        scale=scale,
        window_size=told.window,
        enable_gqa=query.shape[2] != key.shape[-2],
        seqused_k=told.used_kv,
        block_table=told.pages,
    )
    batch = query.shape[0]
    if not return_lse:
        return of_entries(result, batch)
    out, lse = result
    return of_entries(out, batch), normalized(lse_of_entries(lse, batch))


def refuse(problem: Problem) -> Iterator[Refusal]:
    yield from flash_limits.of_the_op(problem)
    yield from flash_limits.of_tokens(problem)
    bias = problem.bias
    if isinstance(bias, Segments):
        yield from flash_limits.of_documents(bias)
    elif isinstance(bias, (Cached, Paged)) and band_of(bias.within)[2] == "top-left":
        yield Refusal("bias", f"takes masks from the bottom right of each sequence, got {bias!r}")
    if isinstance(bias, Paged) and bias.page_size % PAGE:
        yield Refusal("bias", f"takes pages of a multiple of {PAGE} keys, got page_size={bias.page_size}")


def probe() -> Unusable | None:
    """Whether this torch has the function, with these arguments, and for CUDA; it is not imported yet."""
    found = flash_limits.unusable(NEEDED)
    if found is None and find_spec(MODULE) is None:
        return Unusable("unavailable", f"torch {torch.__version__} has no {MODULE}")
    return found


KERNEL = Kernel(
    name="torch/varlen",
    run=run,
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        biases={Cached, KeyPadding, Paged, Segments},
        backward=Backward(biases={Cached, KeyPadding, Segments}),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(8, 0),
    ),
    refuse=refuse,
    probe=probe,
    costs={"cuda": Cost(call=60e-6, pair_dim=8e-15, pair=0.25e-12, token_dim=1e-12)},
    skips={Cached, Segments},
)
