"""The double of FA2's extension: dropout, what it refuses, and what it cannot launch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from brute_force import CLOSE, GRADIENTS_CLOSE, LSE_CLOSE
from extension_calls import HALF, Extension, int32, operands, randn
from flash_doubled import DOUBLE, installed_from


@pytest.fixture(scope="module")
def cuda():
    """The double of the extension."""
    with installed_from(DOUBLE):
        yield Extension(importlib.import_module("flash_attn_2_cuda"))


def packed(seed=0):
    shapes = ((8, 4, 16), (9, 2, 16), (9, 2, 16))
    return [randn(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def pages(num_pages=3, page_size=256, seed=0):
    return randn(num_pages, page_size, 2, 16, seed=seed), randn(num_pages, page_size, 2, 16, seed=seed + 1)


TABLE = int32([[2, 0], [1, -1]])


# Dropout


def test_dropout_keeps_the_mean_and_the_lse_and_repeats_itself_by_its_seed(cuda):
    q, k, v = operands(1, 64, 64)
    plain, lse, *_ = cuda.fwd(q, k, v)
    torch.manual_seed(0)
    first = cuda.fwd(q, k, v, p=0.25)
    runs = torch.stack([cuda.fwd(q, k, v, p=0.25)[0].float() for _ in range(200)])
    torch.manual_seed(0)
    again = cuda.fwd(q, k, v, p=0.25)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(runs[0], first[0].float())
    torch.testing.assert_close(first[1], lse, **LSE_CLOSE)
    # kept with probability 192 / 256, divided by 0.75
    torch.testing.assert_close(runs.mean(0), plain.float(), atol=0.05, rtol=0)


def test_the_backward_pass_drops_what_the_forward_pass_dropped(cuda):
    q, k, v = operands(1, 16, 16)
    dout = randn(*q.shape, seed=9)
    out, lse, marked, state = cuda.fwd(q, k, v, p=0.4, weights=True)
    dv = cuda.bwd(dout, q, k, v, out, lse, p=0.4, state=state)[2]
    together = (dout.double() * out.double()).sum()  # out is linear in v
    torch.testing.assert_close((dv.double() * v.double()).sum(), together, atol=0.02, rtol=0.01)
    assert marked.shape == (1, 4, 128, 128)
    dropped = (marked[..., :16, :16] < 0).float().mean()
    assert 0.3 < dropped < 0.5


def test_gradients_with_dropout_are_those_of_what_was_kept(cuda):
    q, k, v = operands(1, 8, 8, heads=2, heads_k=2)
    dout = randn(*q.shape, seed=9)
    out, lse, marked, state = cuda.fwd(q, k, v, p=0.5, weights=True)
    grads = cuda.bwd(dout, q, k, v, out, lse, p=0.5, state=state)
    leaves = [x[0].double().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    weights = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1)
    kept = marked[0, :, :8, :8] >= 0
    want = (weights * kept / 0.5) @ leaves[2]
    torch.testing.assert_close(out[0].double(), want.detach().transpose(0, 1), **CLOSE)
    want.backward(dout[0].double().transpose(0, 1))
    for got, leaf in zip(grads, leaves):
        torch.testing.assert_close(got[0].double(), leaf.grad.transpose(0, 1), **GRADIENTS_CLOSE)


def test_dropout_does_nothing_to_pages(cuda):
    k, v = pages()
    q = randn(2, 4, 16)
    cu = {"cu_q": [0, 1, 2], "cu_k": [0, 300, 307], "table": TABLE}
    assert torch.equal(cuda.varlen_fwd(q, k, v, **cu, p=0.9)[0], cuda.varlen_fwd(q, k, v, **cu)[0])


# What is refused


REFUSED = {
    "float32": ({}, {"dtype": torch.float32}, "only support fp16 and bf16"),
    "a head_dim over 256": ({}, {"head_dim": 264}, "head dimension at most 256"),
    "a head_dim that is no multiple of 8": ({}, {"head_dim": 12}, "multiple of 8"),
    "heads that are not shared evenly": ({}, {"heads_k": 3}, "must divide number of heads in query"),
    "no batch": ({}, {"batch": 0}, "batch size must be positive"),
    "softcap with dropout": ({"softcap": 1.0, "p": 0.1}, {}, "Softcapping does not support dropout"),
    "weights without dropout": ({"weights": True}, {}, "only supported when p_dropout > 0.0"),
    "dropping all": ({"p": 1.0}, {}, "p_dropout < 1"),
    "slopes in float16": ({"slopes": torch.ones(4, dtype=HALF)}, {}, "ALiBi slopes must have dtype fp32"),
    "slopes of other heads": ({"slopes": torch.ones(3)}, {}, "alibi_slopes must have shape"),
    "no queries: a grid of no blocks": ({}, {"seqlen_q": 0}, "invalid configuration argument"),
}


@pytest.mark.parametrize(("rules", "sizes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_fwd_refuses(cuda, rules, sizes, message):
    with pytest.raises(RuntimeError, match=message):
        cuda.fwd(*operands(**({"batch": 1, "seqlen_q": 3, "seqlen_k": 3} | sizes)), **rules)


def test_fwd_refuses_operands_that_do_not_fit_each_other(cuda):
    q, k, v = operands(1, 3, 3)
    with pytest.raises(RuntimeError, match="query and k must have the same dtype"):
        cuda.fwd(q, k.bfloat16(), v)
    with pytest.raises(RuntimeError, match="v must have shape"):
        cuda.fwd(q, k, v[..., :8])
    with pytest.raises(RuntimeError, match="contiguous last dimension"):
        cuda.fwd(q, k.mT.contiguous().mT, v)
    with pytest.raises(RuntimeError, match="must be on CUDA"):
        cuda.fwd(q, k.to("meta"), v)


def test_the_functions_take_their_arguments_by_position_and_by_type(cuda):
    q, k, v = operands(1, 3, 3)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.module.fwd(q, k, v, out_=None)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.fwd(q, k, v, left=None)  # no limit is -1, not None
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.fwd(q, k, v, slopes=[0.5])


def test_pages_that_are_refused(cuda):
    q = randn(2, 1, 4, 16)
    with pytest.raises(RuntimeError, match="must be divisible by 256"):
        cuda.fwd_kvcache(q, *pages(page_size=128), seqlens=int32([1, 1]), table=TABLE)
    with pytest.raises(RuntimeError, match=r"block_table must have dtype torch\.int32"):
        cuda.fwd_kvcache(q, *pages(), seqlens=int32([1, 1]), table=TABLE.long())
    with pytest.raises(RuntimeError, match="Paged KVcache does not support cache_batch_idx"):
        cuda.fwd_kvcache(q, *pages(), seqlens=int32([1, 1]), table=TABLE, entries=int32([0, 1]))
    with pytest.raises(RuntimeError, match="rotary"):
        cuda.fwd_kvcache(q, *pages(2), cos=torch.ones(4, 8), sin=torch.ones(4, 8))


def test_lengths_that_are_refused(cuda):
    q, k, v = packed()
    with pytest.raises(RuntimeError, match="cu_seqlens_k must have shape"):
        cuda.varlen_fwd(q, k, v, [0, 8], [0, 4, 9])
    with pytest.raises(RuntimeError, match="seqused_k must have dtype int32"):
        cuda.varlen_fwd(q, k, v, [0, 8], [0, 9], used=torch.tensor([3]))


def test_a_backward_pass_without_keys_is_a_grid_of_no_blocks(cuda):
    q, k, v = operands(1, 3, 0)
    out, lse, *_ = cuda.fwd(q, k, v)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        cuda.bwd(out, q, k, v, out, lse)
    assert (cuda.bwd(out, q, k, v, out, lse, deterministic=True)[0] == 0).all()


def test_a_backward_pass_without_queries_gives_keys_no_gradient(cuda):
    q, k, v = operands(1, 0, 3)
    dq, dk, dv = cuda.bwd(q, q, k, v, q, torch.empty(1, 4, 0))
    assert dq.numel() == 0
    assert (dk == 0).all()
    assert (dv == 0).all()
