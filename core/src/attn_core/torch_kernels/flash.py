"""torch/flash: torch's FlashAttention, on CPU and on CUDA.

Called by the bindings behind F.scaled_dot_product_attention: as fast, differentiable, and blind to the process-wide
`sdpa_kernel` switch, so that it certainly runs what it names.

The CPU op reports an LSE of 0.0 for a row without keys; the CUDA op +inf. Both are put right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal, TensorBias
from ..capabilities import ANY_DIM, Backward, Capabilities, Refusal
from ..cost import Cost, Work
from ..kernel import Bound, Kernel
from ..problem import Problem
from . import flash_limits
from .dense import HALF, MASKED, additive, beside, of_rank_four
from .flash_lse import FlashWithLse
from .measured import MEASURED

_cpu = torch._scaled_dot_product_flash_attention_for_cpu
_cuda = torch._scaled_dot_product_flash_attention

#: What a pair takes in the backward, as a multiple of one in the forward.
BACKWARD_PAIR = 3.0


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
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    if bias is None and not return_lse and not query.is_cuda:
        return _cpu(query, key, value, scale=scale)[0]
    if query.is_cuda:
        return _run_cuda(query, key, value, bias is not None, scale, dropout_p, return_lse)
    mask = None
    if isinstance(bias, TensorBias):
        mask = of_rank_four(beside(bias, query.dtype))
    causal = mask is None and bias is not None
    if return_lse:
        return FlashWithLse.apply(query, key, value, mask, causal, scale)  # type: ignore[no-untyped-call]
    return _cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)[0]


def _run_cuda(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, dropout_p: float, return_lse: bool
) -> Any:
    out, lse, *_ = _cuda(query, key, value, dropout_p, causal, False, scale=scale)
    return (out, lse.masked_fill(lse == float("inf"), MASKED)) if return_lse else out


def prepare(problem: Problem) -> Bound | None:
    """The bare op, where the CPU's takes the call as it is."""
    scale, bias = problem.scale, problem.bias
    if problem.is_cuda or problem.return_lse:
        return None
    if bias is None:
        return lambda query, key, value, _: _cpu(query, key, value, scale=scale)[0]
    if not isinstance(bias, TensorBias):
        return lambda query, key, value, _: _cpu(query, key, value, 0.0, True, scale=scale)[0]
    if bias.tensor.ndim not in (2, 4):
        return None
    if bias.tensor.dtype is problem.dtype:
        return lambda query, key, value, b: _cpu(query, key, value, attn_mask=b.tensor, scale=scale)[0]
    if bias.tensor.dtype is torch.bool:
        where = _BY_DTYPE[problem.dtype]
        return lambda query, key, value, b: _cpu(query, key, value, attn_mask=where(b.tensor), scale=scale)[0]
    return None


def _from_boolean(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """As `additive` does, with its two numbers made once: making them takes as long as a small call."""
    attended, masked = (torch.full((), value, dtype=dtype, device="cpu") for value in (0.0, MASKED))

    def from_boolean(mask: Tensor) -> Tensor:
        if type(mask) is Tensor:
            return torch.where(mask, attended, masked)
        return additive(TensorBias(mask), dtype)  # fake tensors meet no real ones

    return from_boolean


_BY_DTYPE = {dtype: _from_boolean(dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


def work(problem: Problem) -> Work | None:
    """What the CPU's op visits. Of a causal mask it leaves out whole blocks alone: a row visits its block's last key.
    Its backward shares heads among threads, and no head between two."""
    if problem.is_cuda:
        return None
    pairs = float(problem.seqlen_q) * float(problem.seqlen_kv)
    if isinstance(problem.bias, Causal):
        rows = 256 if problem.seqlen_q >= 768 else 64 if problem.seqlen_q >= 192 else 32
        pairs = min(pairs, problem.pairs_left() + problem.seqlen_q * (min(rows, problem.seqlen_q) - 1) / 2)
    heads, threads = problem.batch * problem.num_heads, torch.get_num_threads()
    if problem.needs_backward and heads:
        uneven = -(-heads // threads) * threads / heads
        pairs *= (1 + BACKWARD_PAIR * uneven) / (1 + BACKWARD_PAIR)
    return Work(pairs)


def refuse(problem: Problem) -> Iterator[Refusal]:
    yield from flash_limits.of_backward(problem)
    # Both ops mask before they scale: 0 * -inf is NaN, and a negative scale turns -inf into +inf.
    if problem.is_cuda and problem.scale <= 0:  # the end of the last tile is masked, too
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale}")
    elif problem.scale <= 0 and isinstance(problem.bias, Causal):
        yield Refusal("bias", f"takes Causal with a scale above 0, got {problem.scale}")


ON_CPU = Capabilities(
    devices={"cpu"},
    dtypes={torch.float32, torch.float64, torch.float16, torch.bfloat16},
    head_dims=ANY_DIM,
    biases={Causal("top-left"), TensorBias},
    backward=Backward(lse_grad=True, deterministic=True),
    gqa=True,
    return_lse=True,
    deterministic=True,
    compile=True,
)
ON_CUDA = Capabilities(
    devices={"cuda"},
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    biases={Causal("bottom-right")},
    backward=Backward(),
    gqa=True,
    dropout=True,
    return_lse=True,
    deterministic=True,
    compile=True,
    min_compute_capability=(8, 0),
)
KERNEL = Kernel(
    name="torch/flash",
    run=run,
    capabilities=(ON_CPU, ON_CUDA),
    layout="heads-first",
    calls_sdpa=False,
    refuse=refuse,
    prepare=prepare,
    costs={
        "cpu": Cost(
            call=1.31e-05,
            pair_dim=5.19e-11,
            pair=1.04e-09,
            token_dim=4.96e-10,
            token=6.75e-08,
            mask=1.42e-10,
            element=3.07e-09,
            threads=1,
            with_backward=Cost(
                call=0.000177,
                pair_dim=1.84e-10,
                pair=2.9e-09,
                token_dim=3.58e-09,
                token=4.45e-07,
                backward=0.0,
                threads=1,
            ),
            source=MEASURED,
        ),
        "cuda": Cost(call=12e-6, pair_dim=8e-15, pair=0.2e-12, token_dim=1e-12),
    },
    skips={Causal},
    work=work,
)
