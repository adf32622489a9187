"""torch/fa-window and torch/varlen: what they refuse, each limit by its field, and where they cannot be had at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import ALiBi, Cached, Causal, Paged, Problem, Segments, Window, explain, kernel
from attn_core.torch_kernels import fa_window, flash_limits, varlen

FA, VARLEN = "torch/fa-window", "torch/varlen"
KERNELS = (FA, VARLEN)

HOPPER = Problem(
    batch=2, seqlen_q=5, seqlen_kv=7, num_heads=4, num_kv_heads=4, head_dim=64, head_dim_v=64, dtype=torch.bfloat16,
    device="cuda", compute_capability=(9, 0), scale=0.3,
)  # fmt: skip
META = {"dtype": torch.int32, "device": "meta"}
GAPS = Segments([2, 3], [2, 3], starts_kv=[0, 4])
REFUSED = {
    "fa-window takes half precision": (FA, {"dtype": torch.float32}, "dtype"),
    "fa-window takes up to 256": (FA, {"head_dim": 264, "head_dim_v": 264}, "head_dim"),
    "fa-window takes one head_dim": (FA, {"head_dim_v": 32}, "head_dim_v"),
    "fa-window needs Ampere": (FA, {"compute_capability": (7, 5)}, "compute_capability"),
    "fa-window is for CUDA": (FA, {"device": "cpu"}, "device"),
    "fa-window masks before it scales": (FA, {"scale": 0.0}, "scale"),
    "fa-window takes no softcap": (FA, {"softcap": 3.0}, "softcap"),
    "fa-window starts causal at the bottom right": (FA, {"bias": Causal("top-left")}, "bias"),
    "fa-window starts windows at the bottom right": (FA, {"bias": Window(2, 1, "top-left")}, "bias"),
    "fa-window starts ALiBi at the bottom right": (FA, {"bias": ALiBi(4, corner="top-left")}, "bias"),
    "fa-window takes one ALiBi": (
        FA,
        {"bias": ALiBi(4, corner="bottom-right") + ALiBi(4, corner="bottom-right")},
        "bias",
    ),
    "fa-window has no backward with ALiBi": (
        FA,
        {"bias": ALiBi(4, corner="bottom-right"), "requires_grad": True},
        "backward.biases",
    ),
    "fa-window takes no gaps between documents": (FA, {"bias": GAPS}, "bias"),
    "fa-window starts documents at the bottom right": (
        FA,
        {"bias": Segments([2, 3], [4, 3], within=Causal("top-left"))},
        "bias",
    ),
    "fa-window counts ALiBi from the end of each document": (
        FA,
        {"bias": Segments([2, 3], [4, 3]) + ALiBi(4, corner="top-left")},
        "bias",
    ),
    "fa-window's backward is not deterministic": (
        FA,
        {"requires_grad": True, "deterministic": True},
        "backward.deterministic",
    ),
    "fa-window has no gradient through the LSE": (FA, {"requires_grad": True, "return_lse": True}, "lse_grad"),
    "fa-window lacks a backward between 192 and 224 on small devices": (
        FA,
        {"requires_grad": True, "head_dim": 200, "head_dim_v": 200, "compute_capability": (8, 9)},
        "backward.head_dims",
    ),
    "fa-window lacks a backward with dropout above 224 on small devices": (
        FA,
        {"requires_grad": True, "head_dim": 256, "head_dim_v": 256, "dropout_p": 0.1, "compute_capability": (8, 6)},
        "backward.head_dims",
    ),
    "flash lacks a backward with dropout above 224 on small devices": (
        "torch/flash",
        {"requires_grad": True, "head_dim": 256, "head_dim_v": 256, "dropout_p": 0.1, "compute_capability": (8, 6)},
        "backward.head_dims",
    ),
    "varlen takes no dropout": (VARLEN, {"dropout_p": 0.1}, "dropout_p"),
    "varlen takes no window beside lengths": (VARLEN, {"bias": Window(2, 1, "bottom-right")}, "bias"),
    "varlen's pages are for inference": (
        VARLEN,
        {
            "bias": Paged(torch.empty(2, 1, **META), torch.empty(2, **META), 256),
            "seqlen_kv": 256,
            "requires_grad": True,
        },
        "backward.biases",
    ),
    "varlen starts at the bottom right of each sequence": (
        VARLEN,
        {"bias": Cached(torch.empty(2, **META), within=Causal("top-left"))},
        "bias",
    ),
    "varlen takes pages of 256": (
        VARLEN,
        {"bias": Paged(torch.empty(2, 4, **META), torch.empty(2, **META), 64), "seqlen_kv": 256},
        "bias",
    ),
    "varlen counts tokens in 32 bits": (VARLEN, {"batch": 1 << 30}, "batch"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_limit_is_declared(what):
    name, change, field = REFUSED[what]
    problem = replace(HOPPER, **{key: value for key, value in change.items() if key != "bias"})
    if "bias" in change:
        bias = change["bias"].bind(problem.seqlen_q, problem.seqlen_kv).normalize()
        problem = replace(problem, bias=bias.without_data())
    refusals = kernel(name).refusals(problem)
    assert field in [refusal.field for refusal in refusals], refusals
    assert not kernel(name).refusals(HOPPER)


def test_another_implementation_in_place_of_torchs_is_a_reason_to_refuse(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    for each in KERNELS:
        (refusal,) = kernel(each).refusals(HOPPER)
        assert refusal.field == "implementation"
        assert "FA3 is activated in its place" in refusal.message


# Whether it can be had


def test_they_are_unavailable_without_cuda_with_the_reason():
    x = torch.zeros(1, 3, 2, 8)
    told = explain(x, x, x)
    for each in KERNELS:
        if not torch.backends.cuda.is_built():
            assert (told[each].state, told[each].reasons) == (
                "unavailable",
                ("this torch is built without CUDA",),
            )


@pytest.fixture
def built_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return monkeypatch


def test_they_can_be_had_where_torch_has_the_op_and_its_arguments(built_for_cuda):
    built_for_cuda.setattr(flash_limits, "arguments_of_the_op", lambda: fa_window.NEEDED | varlen.NEEDED)
    built_for_cuda.setattr(varlen, "find_spec", lambda name: object())
    assert fa_window.probe() is None
    assert varlen.probe() is None


def test_the_arguments_of_the_op_are_read_from_its_schema():
    found = flash_limits.arguments_of_the_op()
    assert found >= fa_window.NEEDED
    assert {"query", "max_q"} <= found


def test_an_argument_that_an_older_torch_lacks_is_named(built_for_cuda):
    built_for_cuda.setattr(flash_limits, "arguments_of_the_op", lambda: frozenset({"seqused_k", "alibi_slopes"}))
    told = f"torch {torch.__version__} has a _flash_attention_forward without"
    assert fa_window.probe().reason == f"{told} window_size_left, window_size_right"
    assert varlen.probe().reason == f"{told} block_table, window_size_left, window_size_right"
    assert fa_window.probe().state == "unavailable"


def test_a_torch_without_the_function_is_named(built_for_cuda):
    built_for_cuda.setattr(flash_limits, "arguments_of_the_op", lambda: varlen.NEEDED)
    built_for_cuda.setattr(varlen, "find_spec", lambda name: None)
    assert varlen.probe().reason == f"torch {torch.__version__} has no torch.nn.attention.varlen"


def test_a_torch_for_rocm_or_without_flash_attention_is_named(built_for_cuda):
    built_for_cuda.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert fa_window.probe().reason == "this torch is built without FlashAttention"
    built_for_cuda.setattr(torch.version, "hip", "6.4")
    assert varlen.probe().reason == "this torch is built for ROCm, whose FlashAttention is another"
