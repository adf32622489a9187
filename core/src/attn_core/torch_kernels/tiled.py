"""torch/tiled: attention whose cost follows the mask.

Queries are grouped into tiles; each reads the keys that it can see, and batches of tiles are small dense problems for
the device's dense kernel. Nothing of size seqlen_q * seqlen_kv is ever made. `tiling/` says how a mask is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Mask, Score, Segments, Sum
from ..capabilities import ANY_DEVICE, ANY_DIM, Backward, Capabilities, Refusal
from ..cost import Cost
from ..kernel import Kernel
from ..problem import Problem
from ..tracing import is_traced
from .measured import MEASURED
from .tiling import traced
from .tiling.chosen import chosen
from .tiling.function import Tiled
from .tiling.scores import Scores
from .tiling.work import work
from .tiling.written import why_not

_modes_of_dispatch = torch._C._len_torch_dispatch_stack


def run(
    query: Tensor, key: Tensor, value: Tensor, *, bias: AttnBias | None = None, scale: float, return_lse: bool = False
) -> Any:
    """Heads-first: `[batch, num_heads, seqlen, head_dim]`."""
    mask = None if bias is None else bias.mask
    if scale <= 0:  # the dense kernels with a causal mask do so before they scale: 0 * -inf is NaN
        query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
    rules = () if bias is None else bias.scores
    if is_traced() or (_modes_of_dispatch() and _is_one_op(bias)):
        out, lse = traced.tiled(query, key, value, bias, scale)
    else:
        scores = Scores(rules) if rules else None  # type: ignore[arg-type]
        held = () if scores is None else scores.held()
        out, lse = Tiled.apply(query, key, value, mask, scale, scores, chosen(), *held)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def _is_one_op(bias: AttnBias | None) -> bool:
    """Whether modes of dispatch are shown one op: fake tensors have no tables, and a counter wants the pairs."""
    return bias is None or not (bias.scores or bias.holds_data or why_not(bias))


def refuse(problem: Problem) -> Iterator[Refusal]:
    if problem.compiling and problem.bias is not None:
        reason = why_not(problem.bias)
        if reason is not None:
            yield Refusal("compiling", f"takes biases as text and tensors in a graph, and this {reason}")


KERNEL = Kernel(
    name="torch/tiled",
    run=run,
    capabilities=Capabilities(
        devices=ANY_DEVICE,
        dtypes={torch.float32, torch.float64, torch.float16, torch.bfloat16},
        head_dims=ANY_DIM,
        biases={Mask, Score, Segments, Sum},
        backward=Backward(bias_grad=True, lse_grad=True, deterministic=True),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
    ),
    layout="heads-first",
    refuse=refuse,
    costs={
        "cpu": Cost(
            call=0.000278,
            pair_dim=5.46e-11,
            pair=8.09e-10,
            token_dim=6.79e-10,
            token=2.5e-07,
            part=5.98e-05,
            added=8e-09,
            threads=1,
            with_backward=Cost(
                call=0.000937,
                pair_dim=1.68e-10,
                pair=5.55e-09,
                token_dim=1.44e-09,
                token=1.9e-07,
                part=8.71e-05,
                added=5e-09,
                backward=0.0,
                threads=1,
            ),
            source=MEASURED,
        ),
        "cuda": Cost(call=2e-3, pair_dim=60e-15, pair=30e-12, token_dim=4e-12),
        "*": Cost(call=2e-3, pair_dim=30e-12, pair=2e-9, token_dim=2e-9),
    },
    skips={Mask, Segments},  # type: ignore[type-abstract]
    work=work,
)
