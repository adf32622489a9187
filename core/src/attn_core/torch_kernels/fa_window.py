"""torch/fa-window: the op behind torch's FlashAttention on CUDA, with all that it takes: windows, documents (varlen),
ALiBi, and causal masks from the bottom right.

Its backward knows no ALiBi, and would be silently wrong: with ALiBi it is for the forward alone.

A causal mask beside ALiBi is told as a window that reaches all keys before the diagonal. The op's own causal form adds
`slope * key` to every row instead of a distance: the same output, but another LSE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bias import ALiBi, AttnBias, Causal, Segments, Sum, Window
from ..bias.alibi import paper_slopes
from ..capabilities import Backward, Capabilities, Refusal
from ..cost import Cost
from ..kernel import Kernel, Unusable
from ..problem import Problem
from . import flash_limits
from .dense import HALF
from .packed import Packed, flat, lse_of_entries, normalized, of_entries, packed

_forward = torch.ops.aten._flash_attention_forward

#: Arguments of the op without which it is another.
NEEDED = frozenset({"window_size_left", "window_size_right", "alibi_slopes"})
CAUSAL = (-1, 0)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`."""
    scores, mask = flash_limits.parts_of(bias)
    slopes = slopes_of(scores[0], query.device) if scores else None  # type: ignore[arg-type]
    if isinstance(mask, Segments):
        told = packed(mask, query, key)
        out, lse = _called(flat(query), flat(key), flat(value), told, told.window, scale, dropout_p, slopes)
        out, lse = of_entries(out, query.shape[0]), lse_of_entries(lse, query.shape[0])
    else:
        window = flash_limits.window_of(mask)  # type: ignore[arg-type]
        out, lse = _called(query, key, value, None, window, scale, dropout_p, slopes)
    return (out, normalized(lse)) if return_lse else out


def _called(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    told: Packed | None,
    window: tuple[int, int],
    scale: float,
    dropout_p: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    starts_q, starts_kv = (None, None) if told is None else (told.starts_q, told.starts_kv)
    max_q, max_kv = (query.shape[1], key.shape[1]) if told is None else (told.max_q, told.max_kv)
    causal = window == CAUSAL and slopes is None
    if causal:
        window = (-1, -1)
    elif window == CAUSAL:
        window = (max_kv - 1, 0)
    out, lse, *_ = _forward(
        query,
        key,
        value,
        starts_q,
        starts_kv,
        max_q,
        max_kv,
        dropout_p,
        causal,
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
        alibi_slopes=slopes,
    )
    return out, lse


def slopes_of(alibi: ALiBi, device: torch.device) -> Tensor:
    """float32 `[num_heads]` or `[batch, num_heads]`."""
    if alibi.slopes is None:
        return paper_slopes(torch.arange(alibi.num_heads, device=device), alibi.num_heads, torch.float32)
    return alibi.slopes.to(device, torch.float32).contiguous()


def refuse(problem: Problem) -> Iterator[Refusal]:
    yield from flash_limits.of_the_op(problem)
    scores, mask = flash_limits.parts_of(problem.bias)
    if len(scores) > 1:
        yield Refusal("bias", f"takes one ALiBi, got {problem.bias!r}")
    for alibi in scores[:1]:
        assert isinstance(alibi, ALiBi)
        yield from flash_limits.of_alibi(alibi, mask, problem.seqlen_q, problem.seqlen_kv)
    if not isinstance(mask, Segments):
        yield from flash_limits.of_a_window(mask, problem.seqlen_q, problem.seqlen_kv)
        return
    yield from flash_limits.of_documents(mask)
    yield from flash_limits.of_tokens(problem)
    if mask.has_gaps:
        yield Refusal("bias", f"takes documents whose keys follow each other, got {mask!r}")


def probe() -> Unusable | None:
    """Whether this torch has the op, with these arguments, and for CUDA."""
    return flash_limits.unusable(NEEDED)


KERNEL = Kernel(
    name="torch/fa-window",
    run=run,
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        biases={ALiBi, Causal("bottom-right"), Segments, Sum, Window},
        backward=Backward(biases={Causal("bottom-right"), Segments, Window}),
        gqa=True,
        dropout=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(8, 0),
    ),
    refuse=refuse,
    probe=probe,
    costs={"cuda": Cost(call=18e-6, pair_dim=8e-15, pair=0.25e-12, token_dim=1e-12)},
    skips={Causal, Segments, Window},
)
