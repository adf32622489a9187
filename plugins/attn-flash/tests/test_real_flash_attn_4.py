"""The real front end of FlashAttention-4 over a double of its kernels, beside the float64 reference; its stand-in.

`nox -s flash` installs it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch
from attn_core import Causal, Paged, Segments, Window, reference_attention

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real_4
from extension_calls import int32
from flash_doubled import DOUBLE, VERSIONS

pytestmark = pytest.mark.skipif(
    flash_real_4.source() is None, reason=f"flash-attn-4 {VERSIONS['fa4']} is not installed"
)

CLOSE = {"atol": 3e-3, "rtol": 3e-3}
GRADIENTS_CLOSE = {"atol": 1e-2, "rtol": 5e-3}
LSE_CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CORNER = "bottom-right"


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    with flash_real_4.over_the_double(tmp_path_factory.mktemp("flash-attn-4")):
        yield importlib.import_module("flash_attn.cute")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0])).half()


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("head_dim_v", [16, 24], ids=lambda dim: f"head_dim_v {dim}")
@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, {}),
        ({"causal": True}, {"bias": Causal(CORNER)}),
        ({"window_size": (3, 1)}, {"bias": Window(3, 1, CORNER)}),
        ({"window_size": (2, None)}, {"bias": Window(2, None, CORNER)}),
        ({"softcap": 0.7}, {"softcap": 0.7}),
    ],
    ids=["all keys", "causal", "a window", "a window without a right limit", "softcap"],
)
def test_flash_attn_func_is_the_reference_with_a_gradient_of_the_lse(flash, said, meant, head_dim_v):
    kv_heads = 2 if head_dim_v == 16 else 4  # the backward of shared keys takes one head_dim
    q, k, v = randn(2, 5, 4, 16), randn(2, 8, kv_heads, 16, seed=1), randn(2, 8, kv_heads, head_dim_v, seed=2)
    got, want = leaves(q, k, v), leaves(q.double(), k.double(), v.double())
    out, lse = flash.flash_attn_func(*got, **said, return_lse=True)
    reference, reference_lse = reference_attention(*want, **meant)
    torch.testing.assert_close(out.double(), reference, **CLOSE)
    torch.testing.assert_close(lse.double(), reference_lse, **LSE_CLOSE)
    grad, grad_lse = randn(*out.shape, seed=7), randn(*lse.shape, seed=8)
    torch.autograd.backward([out, lse], [grad, grad_lse.float()])
    torch.autograd.backward([reference, reference_lse], [grad.double(), grad_lse.double()])
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad.double(), b.grad, **GRADIENTS_CLOSE)


def test_flash_attn_varlen_func_is_the_reference(flash):
    q, k, v = randn(9, 4, 16), randn(12, 2, 16, seed=1), randn(12, 2, 16, seed=2)
    documents = Segments([3, 4, 2], [5, 4, 3], within=Causal(CORNER))
    got, want = leaves(q, k, v), leaves(*(x.double()[None] for x in (q, k, v)))
    lengths = {"cu_seqlens_q": int32([0, 3, 7, 9]), "cu_seqlens_k": int32([0, 5, 9, 12])}
    out, lse = flash.flash_attn_varlen_func(*got, **lengths, max_seqlen_q=4, max_seqlen_k=5, causal=True)
    reference, reference_lse = reference_attention(*want, bias=documents)
    torch.testing.assert_close(out.double(), reference[0], **CLOSE)
    torch.testing.assert_close(lse.double(), reference_lse[0], **LSE_CLOSE)
    grad = randn(*q.shape, seed=7)
    out.backward(grad)
    reference.backward(grad.double()[None])
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad.double(), b.grad[0], **GRADIENTS_CLOSE)


def test_pages_are_the_reference(flash):
    q, k, v = randn(2, 3, 4, 16), randn(4, 5, 2, 16, seed=1), randn(4, 5, 2, 16, seed=2)
    table, seqlens = [[2, 0], [3, 3]], [8, 4]
    options = {"seqused_k": int32(seqlens), "page_table": int32(table), "causal": True}
    out, lse = flash.flash_attn_varlen_func(q, k, v, **options)
    assert lse is None
    bias = Paged(table, seqlens, 5, within=Causal(CORNER))
    torch.testing.assert_close(out.double(), reference_attention(*(x.double() for x in (q, k, v)), bias)[0], **CLOSE)


def parameters(path: Path, function: str) -> list[tuple[str, str | None]]:
    """Names and defaults, as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    given = found.args
    assert not given.kwonlyargs
    assert not given.posonlyargs
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(each) for each in given.defaults]
    return [(each.arg, default) for each, default in zip(given.args, defaults)]


@pytest.mark.parametrize("function", flash_real_4.FUNCTIONS)
def test_the_stand_in_has_the_signature_of_the_real_one(function):
    ours = DOUBLE / "fa4" / flash_real_4.INTERFACE
    assert parameters(ours, function) == parameters(flash_real_4.source(), function)
