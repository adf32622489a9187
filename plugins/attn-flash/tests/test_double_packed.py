"""The double of FA2's extension with packed sequences, pages and caches."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from brute_force import CLOSE, GRADIENTS_CLOSE, LSE_CLOSE, attend, of_rules
from extension_calls import Extension, int32, randn
from flash_doubled import DOUBLE, installed_from


@pytest.fixture(scope="module")
def cuda():
    """The double of the extension."""
    with installed_from(DOUBLE):
        yield Extension(importlib.import_module("flash_attn_2_cuda"))


# Packed sequences

PACKED = {"cu_q": [0, 2, 2, 7, 8], "cu_k": [0, 4, 6, 9, 9]}  # sequences of (2, 4), (0, 2), (5, 3) and (1, 0)


def packed(seed=0):
    shapes = ((8, 4, 16), (9, 2, 16), (9, 2, 16))
    return [randn(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def sequences():
    for q0, q1, k0, k1 in zip(PACKED["cu_q"], PACKED["cu_q"][1:], PACKED["cu_k"], PACKED["cu_k"][1:]):
        yield slice(q0, q1), slice(k0, k1)


@pytest.mark.parametrize("problem", [{}, {"causal": True}, {"left": 1, "right": 1}, {"softcap": 0.7}], ids=str)
def test_packed_sequences_are_each_by_themselves(cuda, problem):
    q, k, v = packed()
    dout = randn(*q.shape, seed=9)
    out, lse, *_ = cuda.varlen_fwd(q, k, v, **PACKED, **problem)
    grads = cuda.varlen_bwd(dout, q, k, v, out, lse, **PACKED, **problem)
    assert lse.shape == (4, 8)
    for queries, keys in sequences():
        leaves = [q[queries].double(), k[keys].double(), v[keys].double()]
        if 0 in (leaves[0].shape[0], leaves[1].shape[0]):
            assert (out[queries] == 0).all()
            assert (lse[:, queries] == math.inf).all()
            assert all((grad[at] == 0).all() for grad, at in zip(grads, (queries, keys, keys)))
            continue
        [leaf.requires_grad_() for leaf in leaves]
        want, want_lse = of_rules(*leaves, 0, problem)
        want.backward(dout[queries].double())
        torch.testing.assert_close(out[queries].double(), want, **CLOSE)
        torch.testing.assert_close(lse[:, queries].double(), want_lse, **LSE_CLOSE)
        for grad, leaf, at in zip(grads, leaves, (queries, keys, keys)):
            torch.testing.assert_close(grad[at].double(), leaf.grad, **GRADIENTS_CLOSE)


def test_slopes_may_differ_among_packed_sequences(cuda):
    q, k, v = packed()
    slopes = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    together = cuda.varlen_fwd(q, k, v, **PACKED, slopes=slopes, left=8)[0]
    for b, (queries, keys) in enumerate(sequences()):
        if 0 not in (q[queries].shape[0], k[keys].shape[0]):
            want, _ = attend(q[queries], k[keys], v[keys], window=(8, -1), slopes=slopes[b])
            torch.testing.assert_close(together[queries].double(), want, **CLOSE)


def test_rows_that_belong_to_no_sequence_are_not_written(cuda):
    q, k, v = packed()
    cu = {"cu_q": [1, 3, 6], "cu_k": [2, 5, 8]}
    out, lse, *_ = cuda.varlen_fwd(q, k, v, **cu)
    dq, dk, dv = cuda.varlen_bwd(out.nan_to_num(), q, k, v, out, lse, **cu)
    for written, first, last in ((out, 1, 6), (lse.T, 1, 6), (dq, 1, 6), (dk, 2, 8), (dv, 2, 8)):
        assert written[first:last].isfinite().all()
        assert written[:first].isnan().all()
        assert written[last:].isnan().all()


def test_zero_tensors_writes_them_first(cuda):
    q, k, v = packed()
    out, lse, *_ = cuda.varlen_fwd(q, k, v, [1, 3], [2, 5], zero=True)
    assert (out[3:] == 0).all()
    assert (lse[:, 3:] == -math.inf).all()


def test_queries_behind_the_longest_length_that_is_told_are_not_computed(cuda):
    q, k, v = packed()
    out = cuda.varlen_fwd(q, k, v, [0, 4, 8], [0, 4, 9], max_q=3)[0]
    assert out[[0, 1, 2, 4, 5, 6]].isfinite().all()
    assert out[[3, 7]].isnan().all()


def test_seqused_and_leftpad_cut_the_keys_of_a_sequence(cuda):
    q, k, v = packed()
    cu = {"cu_q": [0, 4, 8], "cu_k": [0, 5, 9]}
    out = cuda.varlen_fwd(q, k, v, **cu, used=int32([3, 4]), leftpad=int32([1, 0]), causal=True)[0]
    torch.testing.assert_close(out[:4].double(), attend(q[:4], k[1:3], v[1:3], causal=True)[0], **CLOSE)
    torch.testing.assert_close(out[4:].double(), attend(q[4:], k[5:], v[5:], causal=True)[0], **CLOSE)


def test_one_query_each_with_shared_keys_must_be_one_of_each(cuda):
    q, k, v = packed()
    with pytest.raises(RuntimeError, match=r"shape '\[3, 2, 2, 16\]' is invalid for input of size 512"):
        cuda.varlen_fwd(q, k, v, [0, 1, 1, 2], [0, 3, 6, 9])
    cu_q, cu_k = [0, 1, 2], [0, 4, 9]
    out, lse, *_ = cuda.varlen_fwd(q[:2], k, v, cu_q, cu_k)
    want, want_lse = zip(*(attend(q[b : b + 1], k[at], v[at]) for b, at in enumerate((slice(0, 4), slice(4, 9)))))
    torch.testing.assert_close(out.double(), torch.cat(want), **CLOSE)
    torch.testing.assert_close(lse.double(), torch.cat(want_lse, 1), **LSE_CLOSE)


# Pages and caches


def pages(num_pages=3, page_size=256, seed=0):
    return randn(num_pages, page_size, 2, 16, seed=seed), randn(num_pages, page_size, 2, 16, seed=seed + 1)


TABLE = int32([[2, 0], [1, -1]])


def of_table(cache, entry, seqlen):
    rows = [cache[page] for page in TABLE[entry].tolist() if page >= 0]
    return torch.cat(rows)[:seqlen]


@pytest.mark.parametrize("problem", [{}, {"causal": True}, {"left": 40, "right": 0}], ids=str)
def test_a_table_of_pages_says_which_keys_a_sequence_has(cuda, problem):
    k, v = pages()
    q = randn(2, 3, 4, 16)
    seqlens = [300, 7]
    cached, cached_lse = cuda.fwd_kvcache(q, k, v, seqlens=int32(seqlens), table=TABLE, **problem)
    cu = {"cu_q": [0, 3, 6], "cu_k": [0, 300, 307]}
    varlen, varlen_lse, *_ = cuda.varlen_fwd(q.flatten(0, 1), k, v, **cu, table=TABLE, **problem)
    torch.testing.assert_close(varlen.view_as(cached), cached, atol=0, rtol=0)
    torch.testing.assert_close(varlen_lse.view(4, 2, 3).transpose(0, 1), cached_lse, atol=0, rtol=0)
    for b, seqlen in enumerate(seqlens):
        key, value = of_table(k, b, seqlen)[None], of_table(v, b, seqlen)[None]
        want, want_lse, *_ = cuda.fwd(q[b : b + 1], key, value, **problem)
        torch.testing.assert_close(cached[b : b + 1], want, atol=0, rtol=0)
        torch.testing.assert_close(cached_lse[b : b + 1], want_lse, atol=0, rtol=0)


@pytest.mark.parametrize(("table", "first"), [(None, 250), (TABLE, 254)], ids=["in rows", "in pages, over an edge"])
def test_new_keys_are_written_into_the_cache_first(cuda, table, first):
    k_cache, v_cache = pages(2 if table is None else 3)
    q, k, v = (randn(2, 3, heads, 16, seed=5 + heads) for heads in (4, 2, 2))
    seqlens = [first, 7]

    def of(cache, b):
        return cache[b] if table is None else of_table(cache, b, 512)

    want = [
        torch.cat([of(cache, b)[: seqlens[b]], x[b]]) for b in range(2) for cache, x in ((k_cache, k), (v_cache, v))
    ]
    out, _ = cuda.fwd_kvcache(q, k_cache, v_cache, k=k, v=v, seqlens=int32(seqlens), table=table, causal=True)
    for b, seqlen in enumerate(seqlens):
        key, value = want[2 * b : 2 * b + 2]
        assert torch.equal(of(k_cache, b)[: seqlen + 3], key)
        assert torch.equal(of(v_cache, b)[: seqlen + 3], value)
        torch.testing.assert_close(out[b].double(), attend(q[b], key, value, causal=True)[0], **CLOSE)


def test_a_cache_has_entries_and_a_start_of_each(cuda):
    k, v = randn(3, 6, 2, 12), randn(3, 6, 2, 12, seed=1)
    q = randn(2, 2, 4, 12, seed=2)  # no multiple of 8: padded
    options = {"seqlens": int32([6, 4]), "entries": int32([2, 0]), "leftpad": int32([1, 2])}
    out, lse = cuda.fwd_kvcache(q, k, v, **options, causal=True)
    for b, (entry, keys) in enumerate([(2, slice(1, 6)), (0, slice(2, 4))]):
        want, want_lse = attend(q[b], k[entry, keys], v[entry, keys], causal=True)
        torch.testing.assert_close(out[b].double(), want, **CLOSE)
        torch.testing.assert_close(lse[b].double(), want_lse, **LSE_CLOSE)


def test_a_sequence_without_keys_in_a_cache_is_empty(cuda):
    k, v = pages(2)
    out, lse = cuda.fwd_kvcache(randn(2, 1, 4, 16), k, v, seqlens=int32([0, 5]))
    assert (out[0] == 0).all()
    assert (lse[0] == math.inf).all()
    assert out[1].abs().sum() > 0


@pytest.mark.parametrize("seqlens", [[513, 1], [1, 300]], ids=["more than the table has", "on a page that is none"])
def test_keys_outside_of_the_pool_are_not_read(cuda, seqlens):
    k, v = pages()
    with pytest.raises(RuntimeError, match="an illegal memory access was encountered"):
        cuda.fwd_kvcache(randn(2, 1, 4, 16), k, v, seqlens=int32(seqlens), table=TABLE)
