"""The stand-ins for FA2's, FA3's and FA4's Python sides: the same rule, and where each says it differently."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from brute_force import attend
from extension_calls import int32
from flash_doubled import DOUBLE, installed_from, is_of_flash

NAMES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
CLOSE = {"atol": 3e-3, "rtol": 3e-3}
GRADIENTS_CLOSE = {"atol": 1e-2, "rtol": 5e-3}
LSE_CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROBLEMS = {
    "all keys": {},
    "causal": {"causal": True},
    "a window": {"window": (2, 1)},
    "softcap": {"softcap": 0.7},
    "a scale": {"scale": 0.6},
}


@pytest.fixture(scope="module", params=NAMES)
def flash(request):
    """One stand-in, and its name."""
    with installed_from(DOUBLE, DOUBLE / request.param):
        module = importlib.import_module(NAMES[request.param])
        module.generation = request.param
        yield module


def only(*names):
    return pytest.mark.parametrize("flash", names, indirect=True, scope="module")


def said(flash, problem):
    """The problem in the words of a generation: what brute force calls `window` and `scale`."""
    left, right = problem.get("window", (-1, -1))
    limits = (None if left < 0 else left, None if right < 0 else right) if flash.generation == "fa4" else (left, right)
    rest = {name: problem[name] for name in ("causal", "softcap") if name in problem}
    return rest | {"window_size": limits} | ({"softmax_scale": problem["scale"]} if "scale" in problem else {})


def with_lse(flash):
    return {"return_lse" if flash.generation == "fa4" else "return_attn_probs": True}


def of_empty_rows(flash, lse):
    """FA2's +inf, in place of the -inf of the others."""
    return lse if flash.generation == "fa2" else torch.where(lse == -math.inf, math.inf, lse)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0])).half()


@pytest.mark.parametrize("seqlens", [(5, 5), (3, 6), (5, 2)], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_dense_attention_and_its_gradients_are_those_of_the_brute_force(flash, problem, seqlens):
    if flash.generation == "fa2" and "window" in problem and seqlens == (5, 2):
        problem = {"window": (2, 0)}  # its trap is elsewhere
    q, k, v = randn(1, seqlens[0], 4, 16), *(randn(1, seqlens[1], 2, 16, seed=n) for n in (1, 2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, *_ = flash.flash_attn_func(*leaves, **said(flash, problem), **with_lse(flash))
    exact = [x[0].double().requires_grad_() for x in (q, k, v)]
    want, want_lse = attend(*exact, **problem)
    torch.testing.assert_close(out[0].double(), want, **CLOSE)
    torch.testing.assert_close(of_empty_rows(flash, lse)[0].detach().double(), want_lse.detach(), **LSE_CLOSE)
    dout = randn(*q.shape, seed=7)
    out.backward(dout)
    want.backward(dout[0].double())
    for got, leaf in zip(leaves, exact):
        torch.testing.assert_close(got.grad[0].double(), leaf.grad, **GRADIENTS_CLOSE)


def test_packed_attention_and_its_gradients_are_those_of_each_sequence(flash):
    q, k, v = randn(8, 4, 16), randn(9, 2, 16, seed=1), randn(9, 2, 16, seed=2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    lengths = (int32([0, 3, 8]), int32([0, 5, 9]), 5, 5)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options = said(flash, {"causal": True}) | with_lse(flash)
    out, lse, *_ = flash.flash_attn_varlen_func(*leaves, **dict(zip(names, lengths)), **options)
    assert lse.shape == (4, 8)
    dout = randn(*q.shape, seed=7)
    out.backward(dout)
    for queries, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 8), slice(5, 9))):
        exact = [x.double().requires_grad_() for x in (q[queries], k[keys], v[keys])]
        want, want_lse = attend(*exact, causal=True)
        torch.testing.assert_close(out[queries].double(), want, **CLOSE)
        got_lse = of_empty_rows(flash, lse)[:, queries].detach().double()
        torch.testing.assert_close(got_lse, want_lse.detach(), **LSE_CLOSE)
        want.backward(dout[queries].double())
        for got, at, leaf in zip(leaves, (queries, keys, keys), exact):
            torch.testing.assert_close(got.grad[at].double(), leaf.grad, **GRADIENTS_CLOSE)


@pytest.mark.parametrize(
    ("flash", "page_size"),
    [("fa2", 256), ("fa3", 256), ("fa3", 3), ("fa4", 256), ("fa4", 3)],
    indirect=["flash"],
    scope="module",
)
def test_pages_are_read_by_their_table(flash, page_size):
    q, k, v = randn(2, 2, 4, 16), randn(4, page_size, 2, 16, seed=1), randn(4, page_size, 2, 16, seed=2)
    table, seqlens = int32([[2, 0, 3], [1, 1, -1]]), int32([page_size + 2, page_size - 1])
    options = said(flash, {"causal": True})
    if flash.generation == "fa4":
        options |= {"page_table": table, "seqused_k": seqlens, "return_lse": True}
        out, lse = flash.flash_attn_varlen_func(q, k, v, **options)
    else:
        options |= {"block_table" if flash.generation == "fa2" else "page_table": table}
        options |= {"cache_seqlens": seqlens, "return_softmax_lse": True}
        out, lse, *_ = flash.flash_attn_with_kvcache(q, k, v, **options)
    for b, seqlen in enumerate(seqlens.tolist()):
        key, value = (torch.cat([x[page] for page in table[b].tolist() if page >= 0])[:seqlen] for x in (k, v))
        want, want_lse = attend(q[b], key, value, causal=True)
        torch.testing.assert_close(out[b].double(), want, **CLOSE)
        torch.testing.assert_close(lse[b].double(), want_lse, **LSE_CLOSE)


@only("fa3", "fa4")
def test_only_the_keys_that_are_used_are_read(flash):
    q, k, v = randn(2, 2, 4, 16), randn(2, 6, 2, 16, seed=1), randn(2, 6, 2, 16, seed=2)
    k[0, 4:], k[1, 1:] = math.nan, math.nan
    used = int32([4, 1])
    if flash.generation == "fa3":
        out = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True)
    else:
        out, _ = flash.flash_attn_varlen_func(q, k, v, seqused_k=used, causal=True)
    for b, seqlen in enumerate(used.tolist()):
        want, _ = attend(q[b], k[b, :seqlen], v[b, :seqlen], causal=True)
        torch.testing.assert_close(out[b].double(), want, **CLOSE)


def test_a_query_that_sees_no_key_has_the_lse_of_its_generation(flash):
    q, k, v = randn(1, 3, 4, 16), randn(1, 1, 2, 16, seed=1), randn(1, 1, 2, 16, seed=2)
    out, lse, *_ = flash.flash_attn_func(q, k, v, causal=True, **with_lse(flash))
    assert (out[:, :2] == 0).all()
    assert (lse[..., :2] == (math.inf if flash.generation == "fa2" else -math.inf)).all()
    lse = flash.flash_attn_func(q, k[:, :0], v[:, :0], **with_lse(flash))[1]
    assert (lse == (-math.inf if flash.generation == "fa4" else math.inf)).all()


def test_what_is_returned_without_an_lse(flash):
    q, k, v = randn(1, 3, 4, 16), randn(1, 3, 2, 16, seed=1), randn(1, 3, 2, 16, seed=2)
    got = flash.flash_attn_func(q, k, v)
    if flash.generation == "fa4":
        out, lse = got
        assert lse is None
        assert flash.flash_attn_func(q.requires_grad_(), k, v)[1] is not None  # the backward pass needs it
    else:
        out = got
    assert out.shape == q.shape


def test_a_gradient_of_the_lse_flows_in_fa4_and_nowhere_else(flash):
    q, k, v = randn(1, 3, 4, 16).requires_grad_(), randn(1, 3, 2, 16, seed=1), randn(1, 3, 2, 16, seed=2)
    _, lse, *_ = flash.flash_attn_func(q, k, v, **with_lse(flash))
    (grad,) = torch.autograd.grad(lse.sum(), q)
    exact = q.detach()[0].double().requires_grad_()
    attend(exact, k[0], v[0])[1].sum().backward()
    want = exact.grad if flash.generation == "fa4" else torch.zeros_like(exact)
    torch.testing.assert_close(grad[0].double(), want, **GRADIENTS_CLOSE)


@only("fa3", "fa4")
def test_value_may_have_another_head_dim(flash):
    q, k, v = randn(1, 3, 4, 16).requires_grad_(), randn(1, 4, 4, 16, seed=1), randn(1, 4, 4, 24, seed=2)
    out = flash.flash_attn_func(q, k, v)
    out = out[0] if flash.generation == "fa4" else out
    assert out.shape == (1, 3, 4, 24)
    torch.testing.assert_close(out[0].double(), attend(q[0], k[0], v[0])[0], **CLOSE)
    out.sum().backward()
    assert q.grad.shape == q.shape


DIMS = {
    "fa2": [(16, 16, True), (12, 12, True), (16, 24, False), (264, 264, False)],
    "fa3": [(12, 12, False), (64, 512, True), (72, 80, False), (192, 128, True), (264, 264, False)],
    "fa4": [(12, 12, False), (72, 80, True), (256, 256, True), (264, 264, False)],
}


@pytest.mark.parametrize(
    ("flash", "dim", "dim_v", "taken"),
    [pytest.param(name, *case, id=f"{name}: {case[0]}, {case[1]}") for name, cases in DIMS.items() for case in cases],
    indirect=["flash"],
    scope="module",
)
def test_which_head_dims_are_taken(flash, dim, dim_v, taken):
    q, k, v = randn(1, 2, 2, dim), randn(1, 2, 2, dim, seed=1), randn(1, 2, 2, dim_v, seed=2)
    if taken:
        flash.flash_attn_func(q, k, v)
    else:
        with pytest.raises((RuntimeError, AssertionError), match=r"head|v must have shape"):
            flash.flash_attn_func(q, k, v)


def test_float32_is_refused(flash):
    x = torch.zeros(1, 2, 2, 16)
    with pytest.raises((RuntimeError, AssertionError), match=r"fp16|float16"):
        flash.flash_attn_func(x, x, x)


@only("fa3", "fa4")
def test_pages_have_no_backward(flash):
    q, pages = randn(1, 2, 2, 16).requires_grad_(), randn(2, 4, 2, 16, seed=1)
    if flash.generation == "fa3":
        out = flash.flash_attn_with_kvcache(q, pages, pages, cache_seqlens=3, page_table=int32([[1]]))
        assert not out.requires_grad
    else:
        used = {"seqused_k": int32([3]), "page_table": int32([[1]])}
        out, _ = flash.flash_attn_varlen_func(q, pages, pages.clone(), **used)
        with pytest.raises(AssertionError):
            out.sum().backward()


@only("fa4")
def test_fa4_has_no_backward_for_shared_keys_with_values_of_another_head_dim(flash):
    q, k, v = randn(1, 3, 4, 16).requires_grad_(), randn(1, 4, 2, 16, seed=1), randn(1, 4, 2, 24, seed=2)
    out, _ = flash.flash_attn_func(q, k, v)
    with pytest.raises(AssertionError, match="GQA backward requires head_dim == head_dim_v"):
        out.sum().backward()


@only("fa4")
@pytest.mark.parametrize(("head_dim", "page_size", "taken"), [(24, 4, False), (32, 4, True), (24, 128, True)])
def test_fa4_loads_pages_of_sizes_of_its_own_in_columns_of_16(flash, head_dim, page_size, taken):
    q, pages = randn(1, 2, 2, head_dim), randn(2, page_size, 2, head_dim, seed=1)
    used = {"seqused_k": int32([3]), "page_table": int32([[1]])}
    if taken:
        flash.flash_attn_varlen_func(q, pages, pages, **used)
        return
    with pytest.raises(AssertionError, match="Paged KV does not support irregular head dim"):
        flash.flash_attn_varlen_func(q, pages, pages, **used)


@only("fa4")
def test_in_fa4_minus_1_beside_a_limit_is_a_limit(flash):
    q, k, v = randn(1, 3, 4, 16), randn(1, 3, 2, 16, seed=1), randn(1, 3, 2, 16, seed=2)
    none, _ = flash.flash_attn_func(q, k, v)
    assert torch.equal(flash.flash_attn_func(q, k, v, window_size=(-1, -1))[0], none)
    assert (flash.flash_attn_func(q, k, v, window_size=(-1, 0))[0] == 0).all()  # keys behind the diagonal, up to it


@only("fa3", "fa4")
def test_what_a_stand_in_leaves_out_is_refused_by_name(flash):
    x = randn(1, 2, 2, 16)
    with pytest.raises(NotImplementedError, match="qv: this (stand-in|double)"):
        flash.flash_attn_func(x, x, x, qv=x)


def test_nothing_stays_imported_behind_a_stand_in():
    modules, places = dict(sys.modules), list(sys.path)
    with installed_from(DOUBLE, DOUBLE / "fa3"):
        inside = importlib.import_module("flash_attn_interface")
        assert inside.attend.__module__ == "flash_double.fa3"
    assert inside not in sys.modules.values()
    assert {name for name in sys.modules if is_of_flash(name)} == {name for name in modules if is_of_flash(name)}
    assert sys.path == places
