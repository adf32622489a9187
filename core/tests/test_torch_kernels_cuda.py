"""torch's kernels on CUDA, as far as a machine without one can tell.

Shapes come from the ops' own meta functions, limits from the declarations. Nothing here ran on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import (
    Causal,
    Problem,
    TensorBias,
    attention,
    explain,
    explain_problem,
    kernel,
)
from attn_core.torch_kernels import cudnn, efficient, flash
from torch._subclasses.fake_tensor import FakeTensorMode

BASE = Problem(
    batch=2,
    seqlen_q=5,
    seqlen_kv=7,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    head_dim_v=8,
    dtype=torch.float32,
    device="cpu",
    scale=0.3,
)


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["equal heads", "gqa"])
def test_flash_on_cuda_returns_the_declared_shapes(return_lse, num_kv_heads):
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16, device="cuda")
        key, value = (torch.empty(2, num_kv_heads, 7, 64, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        bias = Causal("bottom-right").bind(5, 7)
        result = flash.run(query, key, value, bias=bias, scale=0.1, dropout_p=0.1, return_lse=return_lse)
        out, lse = result if return_lse else (result, None)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "cuda")
    if return_lse:
        assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)


@pytest.mark.parametrize("bias", ["none", "causal", "boolean", "floating", "per key"])
@pytest.mark.parametrize("head_dim_v", [64, 32])
def test_efficient_returns_the_declared_shapes(bias, head_dim_v):
    query, key = (torch.empty(2, 4, n, 64, dtype=torch.float16, device="meta") for n in (5, 7))
    value = torch.empty(2, 4, 7, head_dim_v, dtype=torch.float16, device="meta")
    tensors = {
        "boolean": torch.empty(1, 1, 5, 7, dtype=torch.bool, device="meta"),
        "floating": torch.empty(2, 4, 5, 7, device="meta"),
        "per key": torch.empty(2, 1, 1, 7, dtype=torch.float16, device="meta"),
    }
    given = TensorBias(tensors[bias]).bind(5, 7) if bias in tensors else None
    given = Causal("top-left").bind(5, 7) if bias == "causal" else given
    out = efficient.run(query, key, value, bias=given, scale=0.1)
    assert (out.shape, out.dtype) == ((2, 4, 5, head_dim_v), torch.float16)


@pytest.mark.parametrize("seqlen_kv", [1, 7, 16, 33])
def test_a_bias_for_efficient_has_aligned_rows_and_the_same_numbers(seqlen_kv):
    query, key = torch.empty(2, 4, 5, 8), torch.empty(2, 4, seqlen_kv, 8)
    for shape in ((2, 4, 5, seqlen_kv), (1, 1, 5, 1), (1, 4, 1, seqlen_kv), (2, 1, 5, seqlen_kv)):
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        got = efficient.aligned(bias, query, key)
        assert torch.equal(got, bias.expand(2, 4, 5, seqlen_kv))
        assert got.stride(-1) == 1
        for size, stride in zip(got.shape[:-1], got.stride()[:-1]):
            assert size == 1 or stride % efficient.ALIGNED == 0, got.stride()


def test_cudnn_returns_the_declared_shapes():
    query, key = (torch.empty(2, 4, 8, 64, dtype=torch.bfloat16, device="meta") for _ in "qk")
    out = cudnn.run(query, key, key, bias=Causal("top-left").bind(8, 8), scale=0.1)
    assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)


HOPPER = replace(BASE, device="cuda", compute_capability=(9, 0), dtype=torch.bfloat16, head_dim=64, head_dim_v=64)
DENSE = TensorBias(torch.empty(5, 7, device="meta")).bind(5, 7)
TRAINED = TensorBias(torch.empty(5, 7, device="meta", requires_grad=True)).bind(5, 7)
CUDA_REFUSALS = {
    "flash masks at the bottom right, not the top left": (
        "torch/flash",
        {"bias": Causal("top-left").bind(5, 7)},
        "bias",
    ),
    "flash takes half precision only": ("torch/flash", {"dtype": torch.float32}, "dtype"),
    "flash takes up to 256": ("torch/flash", {"head_dim": 264, "head_dim_v": 264}, "head_dim"),
    "flash takes one head_dim": ("torch/flash", {"head_dim_v": 128}, "head_dim_v"),
    "flash takes no dense bias": (
        "torch/flash",
        {"bias": DENSE},
        "bias",
    ),
    "flash needs Ampere": ("torch/flash", {"compute_capability": (7, 5)}, "compute_capability"),
    "flash's backward is not deterministic": (
        "torch/flash",
        {"requires_grad": True, "deterministic": True},
        "backward.deterministic",
    ),
    "flash has no gradient through the LSE": ("torch/flash", {"requires_grad": True, "return_lse": True}, "lse_grad"),
    "flash lacks a backward between 192 and 224 on consumer cards": (
        "torch/flash",
        {"requires_grad": True, "head_dim": 200, "head_dim_v": 200, "compute_capability": (8, 9)},
        "backward.head_dims",
    ),
    "flash masks before it scales": ("torch/flash", {"scale": 0.0}, "scale"),
    "efficient masks at the top left": ("torch/efficient", {"bias": Causal("bottom-right").bind(5, 7)}, "bias"),
    "efficient is not asked for grouped heads": ("torch/efficient", {"num_kv_heads": 2}, "num_kv_heads"),
    "efficient is not asked for its padded LSE": (
        "torch/efficient",
        {"return_lse": True},
        "return_lse",
    ),
    "efficient takes multiples of 8": ("torch/efficient", {"head_dim": 60, "head_dim_v": 60}, "head_dim"),
    "efficient takes no bfloat16 before Ampere": ("torch/efficient", {"compute_capability": (7, 5)}, "dtype"),
    "efficient masks before it scales": (
        "torch/efficient",
        {"bias": Causal("top-left").bind(5, 7), "scale": 0.0},
        "bias",
    ),
    "cudnn is not asked for a scale of 0": ("torch/cudnn", {"scale": 0.0}, "scale"),
    "efficient takes no float64": ("torch/efficient", {"dtype": torch.float64}, "dtype"),
    "efficient has no backward under determinism": (
        "torch/efficient",
        {"requires_grad": True, "deterministic": True},
        "backward.deterministic",
    ),
    "cudnn takes up to 128": ("torch/cudnn", {"head_dim": 192, "head_dim_v": 192}, "head_dim"),
    "cudnn needs 2 keys": ("torch/cudnn", {"seqlen_kv": 1}, "seqlen_kv"),
    "cudnn takes no dense bias": (
        "torch/cudnn",
        {"bias": DENSE},
        "bias",
    ),
    "cudnn is not deterministic": ("torch/cudnn", {"deterministic": True}, "deterministic"),
    "cudnn takes no dropout": ("torch/cudnn", {"dropout_p": 0.1}, "dropout_p"),
    "cudnn takes causal on equal lengths": ("torch/cudnn", {"bias": Causal("top-left").bind(5, 7)}, "bias"),
    "flex takes no dropout": ("torch/flex", {"dropout_p": 0.1}, "dropout_p"),
    "flex takes powers of two": ("torch/flex", {"head_dim": 72, "head_dim_v": 72}, "head_dim"),
    "flex gives no gradient to a bias": (
        "torch/flex",
        {
            "bias": TensorBias(torch.empty(5, 7, device="meta", requires_grad=True)).bind(5, 7),
            "bias_requires_grad": True,
        },
        "bias_grad",
    ),
}


@pytest.mark.parametrize("what", CUDA_REFUSALS)
def test_a_limit_on_cuda_is_declared(what):
    name, change, field = CUDA_REFUSALS[what]
    refusals = kernel(name).refusals(replace(HOPPER, **change))
    assert field in [refusal.field for refusal in refusals], refusals
    assert field not in [refusal.field for refusal in kernel(name).refusals(HOPPER)]


def test_explain_says_on_cuda_what_would_run_and_why_not_the_others():
    told = explain_problem(replace(HOPPER, bias=Causal("bottom-right").bind(5, 7), requires_grad=True))
    assert told.chosen == "torch/flash"
    assert told["torch/math"].adaptations == ("materialize",)
    unknown = explain_problem(replace(HOPPER, compute_capability=None))
    assert unknown["torch/flash"].state == "refused"
    assert "compute_capability" in unknown["torch/flash"].refused_fields
    assert any("compute capability unknown" in note for note in unknown.notes)


def test_explain_agrees_with_what_runs_on_meta_tensors():
    query = torch.empty(2, 5, 4, 8, device="meta")
    assert explain(query, query, query).chosen == "torch/math"
    assert attention(query, query, query).shape == (2, 5, 4, 8)
