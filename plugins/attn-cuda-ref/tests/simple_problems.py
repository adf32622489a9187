"""Two problems that use all launches of cuda-ref/simple, small enough to be watched."""

from __future__ import annotations

from dataclasses import replace

import torch
from attn_core import AttnBias, Causal, KeyPadding, Problem, TensorBias

PLAIN = Problem(
    batch=2,
    seqlen_q=33,
    seqlen_kv=50,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    head_dim_v=8,
    dtype=torch.float32,
    device="cpu",
    scale=0.5,
    return_lse=True,
    requires_grad=True,
)
LENGTHS = PLAIN.seqlen_q, PLAIN.seqlen_kv


def problem(bias: AttnBias, trained: bool = False, **changed: object) -> Problem:
    return replace(PLAIN, bias=bias.bind(*LENGTHS), bias_requires_grad=trained, num_heads=2, num_kv_heads=1, **changed)


PROBLEMS = {
    "causal and key padding": problem(Causal("bottom-right") & KeyPadding(torch.tensor([50, 0])), dtype=torch.float16),
    "a trained tensor": problem(TensorBias(torch.zeros(1, 2, *LENGTHS).requires_grad_()), True, batch=1),
}
