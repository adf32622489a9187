"""flash/fa3: FlashAttention-3, for Hopper, declared as its functions and the checks of its extension take it.

Shah and others 2024, arXiv:2407.08608. It has no dropout and no ALiBi. That its backward is bit-equal with
`deterministic=True` has been contested (https://github.com/Dao-AILab/flash-attention/issues/2244), so that is not
declared. Neither is fp8, which is no dtype of attention here.
"""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import (
    Backward,
    Cached,
    Capabilities,
    Causal,
    Kernel,
    KeyPadding,
    Paged,
    Problem,
    Refusal,
    Segments,
    Unusable,
    Window,
)
from attn_core.bias import AttnBias

from .. import library
from . import masks, priors
from .fa2 import HALF

IN_BACKWARD: frozenset[type[AttnBias] | AttnBias] = frozenset({Causal("bottom-right"), Window, Segments})
BIASES: frozenset[type[AttnBias] | AttnBias] = frozenset({*IN_BACKWARD, KeyPadding, Cached, Paged})


def probe() -> Unusable | None:
    """Whether FlashAttention-3 is there, with its kernels in CUDA."""
    return library.FA3.unusable()


def refuse(problem: Problem) -> Iterator[Refusal]:
    """What the declaration cannot say."""
    yield from masks.refusals(problem)
    yield from masks.refusals_of_corners(problem)
    yield from masks.refusals_of_gaps(problem, in_forward=False)
    dim, dim_v = problem.head_dim, problem.head_dim_v
    if dim != dim_v and not (dim <= 64 or (128 < dim <= 192 and 96 < dim_v <= 128)):
        text = "takes another head_dim_v with head_dim up to 64, or from 136 to 192 with head_dim_v from 104 to 128"
        yield Refusal("head_dim_v", f"{text}, got {dim} with {dim_v}")
    if problem.return_lse and not has_cache(problem) and not library.FA3.takes(FUNCTION, "return_attn_probs"):
        text = "returns no LSE for dense and packed sequences: its functions have no return_attn_probs"
        yield Refusal("return_lse", f"this release {text}")


#: The function that is looked at for what a release can do: the others changed with it.
FUNCTION = "flash_attn_func"


def has_cache(problem: Problem) -> bool:
    """Whether keys lie in a cache or in pages, or are padded."""
    return masks.asked(problem.bias).cache is not None


KERNEL = Kernel(
    name="flash/fa3",
    run="attn_flash.kernels.run_fa3:run",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(8, 257, 8),
        head_dims_v=range(8, 513, 8),
        biases=BIASES,
        backward=Backward(head_dims_v=range(8, 257, 8), biases=IN_BACKWARD),
        gqa=True,
        softcap=True,
        return_lse=True,
        deterministic=True,
        min_compute_capability=(9, 0),
        max_compute_capability=(9, 0),
    ),
    refuse=refuse,
    probe=probe,
    costs={"cuda": priors.FA3},
    skips={Causal, Window, Segments, Cached, Paged},
)
