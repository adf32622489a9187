"""torch/flex: FlexAttention. Takes any mask and score by its own rule, a dense bias, and a softcap.

On the CPU, FlexAttention has no backward, and outside a compiled graph it is not fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, BlockMask, Intersection, Mask, Score, ScoreMod, Segments, Sum, TensorBias
from ..bias.zero_padded import ZeroPadded
from ..capabilities import ANY_DIM, Backward, Capabilities, Refusal
from ..cost import Cost, Work
from ..kernel import Kernel
from ..problem import Problem
from ..tracing import is_traced, without_modes
from . import by_rule
from .flex_forms import block_mask_of, numbers_are_unknown, score_mod_of
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

    tracing = is_traced()
    if not query.is_cuda:  # forward only there: it refuses what requires a gradient, even under no_grad
        query, key, value = query.detach(), key.detach(), value.detach()
    flex: Any = flex_attention if tracing or not query.is_cuda else _compiled()
    block_mask = None
    mask = None if bias is None else bias.mask
    if mask is not None:
        fresh = mask.holds_data or numbers_are_unknown()
        block_mask = block_mask_of(mask, query.device) if fresh else _kept(mask, query.device)
    # Outside a graph FlexAttention traces a second number as a symbolic one, which torch 2.15 for one then refuses.
    cap = softcap if softcap is None or tracing or query.is_cuda else torch.tensor(softcap, dtype=torch.float32)
    result = flex(
        query,
        key,
        value,
        score_mod=score_mod_of(() if bias is None else bias.scores, cap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    return (result[0], result[1].lse) if return_lse else result


def refuse(problem: Problem) -> Iterator[Refusal]:
    bias = problem.bias
    if bias is None or problem.is_cuda or not problem.compiling:
        return
    if torch.is_grad_enabled() and any(isinstance(part, ScoreMod) for part in bias.scores):
        text = "has no backward, and in a graph it is not seen whether what a ScoreMod captures needs a gradient"
        yield Refusal("backward", f"{text}; under torch.no_grad() none does")
    for part in (*bias.scores, *_parts(bias.mask)):
        if _read_by_lookup(part):  # torch 2.13's inductor: NoValidChoicesError, or an assertion
            yield Refusal("bias", f"on the CPU, takes masks that read a tensor outside of graphs only, got {part!r}")


def work(problem: Problem) -> Work | None:
    """On the CPU, the rules of scores are asked for every pair; on CUDA they are part of a fused kernel."""
    return None if problem.is_cuda else by_rule.work(problem)


def _parts(mask: Mask | None) -> tuple[Mask, ...]:
    parts = mask.parts if isinstance(mask, Intersection) else () if mask is None else (mask,)
    return tuple([part.padded if isinstance(part, ZeroPadded) else part for part in parts])


def _read_by_lookup(part: AttnBias) -> bool:
    """Whether the rule of a mask looks something up in a table, and not in the blocks that are handed over as such."""
    if isinstance(part, TensorBias):
        return part.tensor.dtype is torch.bool
    if type(part) is BlockMask:
        return any(map(_read_by_lookup, _parts(part.within)))
    return isinstance(part, Segments) or (isinstance(part, Mask) and bool(part.held()))


@functools.lru_cache(maxsize=64)
def _kept(mask: Mask, device: torch.device) -> Any:
    with without_modes():
        return block_mask_of(mask, device)


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
            biases={Mask, Score, ScoreMod, Sum, TensorBias},
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
            biases={Mask, Score, ScoreMod, Sum, TensorBias},
            backward=Backward(),
            gqa=True,
            softcap=True,
            return_lse=True,
            compile=True,
            min_compute_capability=(8, 0),
        ),
    ),
    layout="heads-first",
    refuse=refuse,
    work=work,
    costs={
        "cpu": Cost(
            call=0.00467,
            pair_dim=5.82e-11,
            pair=1.09e-08,
            token_dim=1.47e-09,
            token=9.04e-07,
            mask=9.82e-09,
            element=5.54e-08,
            added=7e-09,
            threads=1,
            source=MEASURED,
        ),
        "cuda": Cost(call=80e-6, pair_dim=12e-15, pair=0.4e-12, token_dim=1e-12, mask=1e-12),
    },
)
