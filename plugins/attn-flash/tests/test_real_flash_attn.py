"""The real Python package of FlashAttention-2 over the double of its extension, beside the float64 reference.

What the package does itself is under test here: it pads head_dim, orders arguments, keeps what its backward pass needs,
and cuts the gradients. `nox -s flash` installs it.
"""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from attn_core import ALiBi, Causal, Paged, Segments, Window, reference_attention

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real
from extension_calls import int32
from flash_doubled import DOUBLE, installed_from

pytestmark = pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed")

CLOSE = {"atol": 3e-3, "rtol": 3e-3}
GRADIENTS_CLOSE = {"atol": 1e-2, "rtol": 5e-3}
LSE_CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SLOPES = [0.5, 0.25, 0.125, 0.0625]
CORNER = "bottom-right"
DENSE = {
    "all keys": ({}, {}),
    "causal": ({"causal": True}, {"bias": Causal(CORNER)}),
    "a window": ({"window_size": (3, 1)}, {"bias": Window(3, 1, CORNER)}),
    "softcap": ({"softcap": 0.7}, {"softcap": 0.7}),
    "ALiBi": ({"alibi_slopes": torch.tensor(SLOPES)}, {"bias": ALiBi(4, slopes=torch.tensor(SLOPES), corner=CORNER)}),
    "a scale": ({"softmax_scale": 0.6}, {"scale": 0.6}),
    "deterministic": ({"deterministic": True}, {}),
}


@pytest.fixture(scope="module")
def flash():
    with flash_real.over_the_double() as interface:
        yield interface


def randn(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0])).to(dtype)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("head_dim", [16, 12], ids=lambda dim: f"head_dim {dim}")
@pytest.mark.parametrize("seqlens", [(9, 9), (5, 8), (1, 6)], ids=str)
@pytest.mark.parametrize(("said", "meant"), DENSE.values(), ids=DENSE.keys())
def test_flash_attn_func_is_the_reference(flash, said, meant, seqlens, head_dim):
    q, k, v = (randn(2, n, h, head_dim, seed=h) for n, h in zip((seqlens[0], seqlens[1], seqlens[1]), (4, 2, 2)))
    got, want = leaves(q, k, v), leaves(q.double(), k.double(), v.double())
    out, lse, _ = flash.flash_attn_func(*got, **said, return_attn_probs=True)
    reference, reference_lse = reference_attention(*want, **meant)
    torch.testing.assert_close(out.double(), reference, **CLOSE)
    torch.testing.assert_close(lse.double(), reference_lse, **LSE_CLOSE)
    grad = randn(*q.shape, seed=7)
    out.backward(grad)
    reference.backward(grad.double())
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad.double(), b.grad, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("head_dim", [16, 12], ids=lambda dim: f"head_dim {dim}")
@pytest.mark.parametrize(
    ("said", "within"),
    [({}, None), ({"causal": True}, Causal(CORNER)), ({"window_size": (2, 0)}, Window(2, 0, CORNER))],
    ids=["all keys", "causal", "a window"],
)
def test_flash_attn_varlen_func_is_the_reference(flash, said, within, head_dim):
    q, k, v = (randn(n, h, head_dim, seed=h) for n, h in zip((9, 12, 12), (4, 2, 2)))
    documents = Segments([3, 4, 2], [5, 4, 3], within=within)
    got = leaves(q, k, v)
    want = leaves(*(x.double()[None] for x in (q, k, v)))
    packs = (int32([0, 3, 7, 9]), int32([0, 5, 9, 12]), 4, 5)
    out, lse, _ = flash.flash_attn_varlen_func(*got, *packs, **said, return_attn_probs=True)
    reference, reference_lse = reference_attention(*want, bias=documents)
    torch.testing.assert_close(out.double(), reference[0], **CLOSE)
    torch.testing.assert_close(lse.double(), reference_lse[0], **LSE_CLOSE)
    grad = randn(*q.shape, seed=7)
    out.backward(grad)
    reference.backward(grad.double()[None])
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad.double(), b.grad[0], **GRADIENTS_CLOSE)


@pytest.mark.parametrize("within", [None, Causal(CORNER)], ids=["all keys", "causal"])
def test_flash_attn_with_kvcache_is_the_reference(flash, within):
    q, k, v = (randn(n, s, h, 16, seed=h) for n, s, h in zip((2, 4, 4), (3, 256, 256), (4, 2, 2)))
    table, seqlens = [[2, 0], [3, 3]], [300, 7]
    options = {"cache_seqlens": int32(seqlens), "block_table": int32(table), "return_softmax_lse": True}
    out, lse = flash.flash_attn_with_kvcache(q, k, v, causal=within is not None, **options)
    bias = Paged(table, seqlens, 256, within=within)
    reference, reference_lse = reference_attention(q.double(), k.double(), v.double(), bias=bias)
    torch.testing.assert_close(out.double(), reference, **CLOSE)
    torch.testing.assert_close(lse.double(), reference_lse, **LSE_CLOSE)


def test_dropout_is_the_same_in_both_passes(flash):
    q, k, v = leaves(*(randn(1, 16, h, 16, seed=h) for h in (4, 2, 2)))
    torch.manual_seed(0)
    out = flash.flash_attn_func(q, k, v, dropout_p=0.3)
    grad = randn(*q.shape, seed=7)
    out.backward(grad)
    together = (out.double() * grad.double()).sum()  # out is linear in v
    torch.testing.assert_close((v.grad.double() * v.double()).sum(), together, atol=0.02, rtol=0.01)
    assert not torch.equal(out, flash.flash_attn_func(q, k, v))


def test_the_ops_can_be_compiled(flash):
    q, k, v = (randn(1, 8, h, 16, seed=h) for h in (4, 2, 2))

    def run(q, k, v):
        return flash.flash_attn_func(q, k, v, causal=True)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_the_stand_in_has_the_signature_of_the_real_package(flash, name):
    if version("flash-attn") != "2.8.3":
        pytest.skip(f"the stand-in is of 2.8.3, and {version('flash-attn')} is installed")

    def shape(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    real = shape(getattr(flash, name))
    with installed_from(DOUBLE, DOUBLE / "fa2"):
        import flash_attn

        assert shape(getattr(flash_attn, name)) == real
