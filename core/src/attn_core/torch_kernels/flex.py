"""torch/flex: FlexAttention. Takes any mask and score by its own rule, a dense bias, and a softcap.

On the CPU, FlexAttention has no backward, and outside a compiled graph it is not fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Mask, Score, Sum, TensorBias
from ..capabilities import ANY_DIM, Backward, Capabilities
from ..cost import Cost
from ..kernel import Kernel
from .dense import additive, of_rank_four
from .measured import MEASURED


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: AttnBias | None = None,
    scale: float,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # about a second: it loads dynamo

    tracing = torch.compiler.is_compiling()
    if not query.is_cuda:  # forward only there: it refuses what requires a gradient, even under no_grad
        query, key, value = query.detach(), key.detach(), value.detach()
    flex: Any = flex_attention if tracing or not query.is_cuda else _compiled()
    block_mask = None
    mask = None if bias is None else bias.mask
    if mask is not None:
        fresh = tracing or mask.holds_data
        block_mask = _block_mask(mask, query.device) if fresh else _cached_block_mask(mask, query.device)
    result = flex(
        query,
        key,
        value,
        score_mod=_score_mod(() if bias is None else bias.scores, softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    return (result[0], result[1].lse) if return_lse else result


def _score_mod(scores: tuple[AttnBias, ...], softcap: float | None) -> Callable[..., Tensor] | None:
    """softcap, then what is no mask."""
    if not scores and softcap is None:
        return None
    written = tuple([_additive(part) if isinstance(part, TensorBias) else part for part in scores])

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = score.float()  # outside a graph it comes in the operands' dtype
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for part in written:
            score = part.score(score, b, h, q, k)
        return score

    return changed


def _additive(bias: TensorBias) -> TensorBias:
    """In float32, as FlexAttention's scores are, whatever the operands."""
    return TensorBias(of_rank_four(additive(bias, torch.float32)), bias.lengths)


def _block_mask(bias: Mask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    seqlen_q, seqlen_kv = bias.bound_lengths()
    batch, num_heads = (None if size == 1 else size for size in bias.batch_and_heads)
    return create_block_mask(bias.rule(device), batch, num_heads, seqlen_q, seqlen_kv, device=device)


_cached_block_mask = functools.lru_cache(maxsize=64)(_block_mask)


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """The fused kernel: outside a graph, FlexAttention would write the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


KERNEL = Kernel(
    name="torch/flex",
    run=run,
    capabilities=(
        Capabilities(
            devices={"cpu"},
            dtypes={torch.float32, torch.float16, torch.bfloat16},
            head_dims=ANY_DIM,
            head_dims_v=ANY_DIM,
            biases={Mask, Score, Sum, TensorBias},
            gqa=True,
            softcap=True,
            return_lse=True,
            deterministic=True,
            compile=True,
            strided_head_dim=True,
        ),
        Capabilities(
            devices={"cuda"},
            dtypes={torch.float32, torch.float16, torch.bfloat16},
            head_dims=frozenset({16, 32, 64, 128, 256}),
            head_dims_v=frozenset({16, 32, 64, 128, 256}),
            biases={Mask, Score, Sum, TensorBias},
            backward=Backward(),
            gqa=True,
            softcap=True,
            return_lse=True,
            compile=True,
            min_compute_capability=(8, 0),
        ),
    ),
    layout="heads-first",
    costs={
        "cpu": Cost(call=4.5e-3, pair_dim=26e-12, pair=6.6e-9, token_dim=0.4e-9, mask=11e-9, source=MEASURED),
        "cuda": Cost(call=80e-6, pair_dim=12e-15, pair=0.4e-12, token_dim=1e-12, mask=1e-12),
    },
)
