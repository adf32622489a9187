"""flash/fa2: FlashAttention-2, declared as its functions and the checks of its extension take it.

Dao 2023, arXiv:2307.08691. `refuse` says what these let through and compute otherwise than asked: what its kernels do
is in its sources, csrc/flash_attn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attn_core import (
    ALiBi,
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
from attn_core.bias import AttnBias, Sum
from attn_core.bias.base import known
from attn_core.torch_kernels import flash_limits

from .. import library
from . import masks, priors

HALF = frozenset({torch.float16, torch.bfloat16})
#: Causal has a corner, so it is named by its value; what windows, documents and caches begin from, `masks` refuses.
IN_BACKWARD: frozenset[type[AttnBias] | AttnBias] = frozenset({Causal("bottom-right"), Window, Segments, ALiBi, Sum})
BIASES: frozenset[type[AttnBias] | AttnBias] = frozenset({*IN_BACKWARD, KeyPadding, Cached, Paged})
#: Pages hold so many keys, or a multiple.
PAGE = 256


def probe() -> Unusable | None:
    """Whether FlashAttention-2 is there, with its kernels in CUDA."""
    return library.FA2.unusable()


def refuse(problem: Problem) -> Iterator[Refusal]:
    """What the declaration cannot say."""
    asked = masks.asked(problem.bias)
    yield from masks.refusals(problem)
    yield from masks.refusals_of_alibi(problem)
    yield from masks.refusals_of_gaps(problem, in_forward=True)
    if asked.segments is None:
        mask = None if problem.bias is None else masks.inner(problem.bias.mask)
        yield from flash_limits.of_a_window(mask, problem.seqlen_q, problem.seqlen_kv)
    yield from _refusals_of_dropout(asked, problem)
    yield from _refusals_of_caches(asked, problem)
    yield from _refusals_of_releases(problem)


def _refusals_of_dropout(asked: masks.Asked, problem: Problem) -> Iterator[Refusal]:
    if not problem.dropout_p:
        return
    got = f"{problem.dropout_p:g}"
    if problem.return_lse:
        text = "gives the LSE beside dropout only together with all weights, [batch, num_heads, seqlen_q, seqlen_kv]"
        yield Refusal("return_lse", text)
    if problem.softcap is not None:
        yield Refusal("dropout_p", f"takes no dropout beside softcap, got {got}")
    if asked.cache is not None:
        yield Refusal("dropout_p", f"takes no dropout with a cache or padding, got {got}")
    if problem.needs_backward and problem.head_dim > 192 and problem.compute_capability in flash_limits.SMALL:
        capability = "sm_" + "".join(map(str, problem.compute_capability))
        text = f"with dropout it takes up to 192 in the backward on {capability}, got {problem.head_dim}"
        yield Refusal("backward.head_dims", f"{text}: it would write no gradients, and say nothing")


def _refusals_of_caches(asked: masks.Asked, problem: Problem) -> Iterator[Refusal]:
    if asked.cache is None:
        return
    if problem.compiling:  # flash_attn_with_kvcache is no op of torch
        yield Refusal("compiling", f"takes {type(asked.cache).__name__} outside of graphs only")
    if isinstance(asked.cache, Paged) and asked.cache.page_size % PAGE:
        yield Refusal("bias", f"takes pages of a multiple of {PAGE} keys, got page_size={asked.cache.page_size}")


def _refusals_of_releases(problem: Problem) -> Iterator[Refusal]:
    """What some releases, or all up to now, cannot do."""
    capability = problem.compute_capability
    if capability is not None and capability[0] == 11:
        text = "releases are built for sm_80, sm_90, sm_100 and sm_120, and what these run on"
        yield Refusal("compute_capability", f"{text}, got sm_11{capability[1]}")
    elif capability is not None and capability >= (10, 0) and library.FA2.is_older("2.7.3"):
        text = f"flash-attn {library.FA2.installed()} was released before there were kernels for sm_100"
        yield Refusal("compute_capability", f"{text}, got sm_{capability[0]}{capability[1]}; they came with 2.7.3")
    segments = problem.bias is not None and isinstance(problem.bias.mask, Segments)
    if problem.needs_backward and not segments and library.FA2.is_older("2.8.4"):
        yield from _refusals_of_long_gradients(problem)


def _refusals_of_long_gradients(problem: Problem) -> Iterator[Refusal]:
    """Places in the gradient of query are 32 bits (https://github.com/Dao-AILab/flash-attention/pull/2260)."""
    rows = -(-problem.seqlen_q // 128) * 128
    elements = rows * problem.num_heads * (-(-problem.head_dim // 32) * 32)
    if known(elements >= 2**31):
        text = "takes in the backward up to 2**31 - 1 elements of seqlen_q * num_heads * head_dim, rounded up to tiles"
        yield Refusal("seqlen_q", f"{text}, got {elements}")


KERNEL = Kernel(
    name="flash/fa2",
    run="attn_flash.kernels.run_fa2:run",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(1, 257),
        biases=BIASES,
        backward=Backward(biases=IN_BACKWARD, deterministic=True),
        gqa=True,
        softcap=True,
        dropout=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(8, 0),
        max_compute_capability=(12, 1),
    ),
    refuse=refuse,
    probe=probe,
    costs={"cuda": priors.FA2},
    skips={Causal, Window, Segments, Cached, Paged},
)
