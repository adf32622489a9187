"""cuda-ref/simple, declared: CUDA cores, every bias that has a rule, any head_dim up to 256; readable before fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attn_core import (
    ALiBi,
    Backward,
    BlockMask,
    Cached,
    Capabilities,
    Causal,
    Cost,
    Intersection,
    Kernel,
    KeyPadding,
    Neighborhood,
    PrefixLM,
    Problem,
    Refusal,
    RelPosTable,
    Segments,
    Sum,
    TensorBias,
    Window,
)

from .. import device
from ..translate import strangers

#: So many of each fit the indices of the text.
MOST = (1 << 31) - 64


def refuse(problem: Problem) -> Iterator[Refusal]:
    yield from device.refusals(problem)
    for part in strangers(problem.bias):
        yield Refusal("bias", f"takes kinds that are written in its text, got {part!r}")
    if not problem.compiling:  # else lengths may be symbolic
        for name, tokens in (("seqlen_q", problem.seqlen_q), ("seqlen_kv", problem.seqlen_kv)):
            if problem.batch * problem.num_heads * (tokens // 8 + 1) > MOST:
                yield Refusal(name, f"takes at most {MOST} blocks of 8 tokens, over all batch entries and heads")


KERNEL = Kernel(
    name="cuda-ref/simple",
    run="attn_cuda_ref.kernels.run_simple:run",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes={torch.float32, torch.float16, torch.bfloat16},
        head_dims=range(1, 257),
        head_dims_v=range(1, 257),
        biases={
            ALiBi,
            BlockMask,
            Cached,
            Causal,
            Intersection,
            KeyPadding,
            Neighborhood,
            PrefixLM,
            RelPosTable,
            Segments,
            Sum,
            TensorBias,
            Window,
        },
        backward=Backward(bias_grad=True, lse_grad=True, deterministic=True),
        gqa=True,
        softcap=True,
        return_lse=True,
        deterministic=True,
        batch_invariant=True,
        compile=True,
        strided_head_dim=True,
        empty_lengths=True,
        min_compute_capability=(7, 5),
    ),
    refuse=refuse,
    probe=device.probe,
    # Not measured. Per pair, what a kernel of CUDA cores takes that reads both numbers of each product from shared
    # memory; per call, more than any kernel of torch is taken for: until it has run on GPUs, it is there for those who
    # name it, and for what no other kernel takes.
    costs={"cuda": Cost(call=4e-3, pair_dim=600e-15, pair=20e-12, token_dim=4e-12, backward=3.5)},
    skips={Causal, Window, PrefixLM, KeyPadding, Cached, Segments, Neighborhood, BlockMask, Intersection},
)
