"""Unfused operations give what the definition gives, values and gradients, for every small window and random others."""

from __future__ import annotations

import sys
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk, parts, products

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from unfused_problems import SEED, Problem, at_random, by_definition, gradients, on_a_line, ours

#: What a few float64 sums in another order may differ by.
CLOSE = {"atol": 1e-11, "rtol": 1e-11}


def check(problem: Problem) -> None:
    operands = problem.operands()
    made, expected = ours(problem, operands), by_definition(problem, operands)
    made_gradients, expected_gradients = (gradients(out, operands) for _, out in (made, expected))
    said = f"{problem}, seed {SEED}"
    for name, got, want in (("attn", made[0], expected[0]), ("out", made[1], expected[1])):
        assert got.shape == want.shape, f"{name} of {said}"
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name} of {said}: {text}")
    for name, got, want in zip(operands, made_gradients, expected_gradients):
        torch.testing.assert_close(
            got, want, **CLOSE, msg=lambda text, name=name: f"gradient to {name}, {said}: {text}"
        )


@pytest.fixture
def blocks_of(monkeypatch):
    """Blocks of so many queries on each axis, a few of them at a time."""

    def choose(rows: int, elements: int) -> None:
        monkeypatch.setattr(parts, "block", lambda points, *rest: (rows,) * len(points))
        monkeypatch.setattr(products, "BLOCKS", elements)
        parts.parts.cache_clear()

    yield choose
    parts.parts.cache_clear()


def test_every_small_problem_on_a_line():
    problems = on_a_line(11)
    assert len(problems) > 150
    for problem in problems:
        check(problem)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_every_small_problem_on_a_line_whatever_the_blocks(rows, blocks_of):
    blocks_of(rows, 64)
    for problem in on_a_line(9):
        check(problem)


@pytest.mark.parametrize(("rank", "longest", "count"), [(2, 9, 300), (3, 6, 100)], ids=["2-D", "3-D"])
def test_random_problems(rank, longest, count):
    for problem in at_random(count, rank, longest):
        check(problem)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("rank", "longest", "count"), [(2, 9, 50), (3, 6, 15)], ids=["2-D", "3-D"])
def test_random_problems_whatever_the_blocks(rank, longest, count, rows, blocks_of):
    blocks_of(rows, 200)
    for problem in at_random(count, rank, longest, seed=SEED + rows):
        check(problem)


def test_windows_written_by_hand():
    """Each key is the number of its place, so that the weights of a query of 1 are the keys that it sees."""

    def seen(length, kernel, **window):
        key = torch.arange(float(length)).view(1, 1, length, 1)
        return na1d_qk(torch.ones_like(key), key, kernel, **window)[0, 0]

    assert seen(7, 3)[[0, 6]].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert seen(8, 4)[[0, 3, 7]].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [4, 5, 6, 7]]
    assert seen(7, 3, dilation=2)[[3, 6]].tolist() == [[1, 3, 5], [2, 4, 6]]
    assert seen(7, 3, dilation=2, is_causal=True)[2].tolist() == [0, 2, -torch.inf]


def test_slots_are_ordered_by_the_first_axis_and_then_the_next():
    key = torch.arange(60.0).view(1, 1, 3, 4, 5, 1)
    attn = na3d_qk(torch.ones_like(key), key, (2, 3, 3))
    assert attn[0, 0, 0, 0, 0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12, 20, 21, 22, 25, 26, 27, 30, 31, 32]


def test_additional_tokens_come_last_and_no_mask_touches_them():
    query, key = torch.randn(2, 1, 2, 4, 4, 8)
    tokens = torch.randn(1, 2, 3, 8)
    attn = na2d_qk(query, key, 3, additional_keys=tokens, is_causal=True)
    assert attn.shape[-1] == 9 + 3
    assert attn[0, 0, 0, 0].isneginf().tolist() == [False, *[True] * 8, False, False, False]
    torch.testing.assert_close(attn[..., 9:], torch.einsum("bhxyd,bhtd->bhxyt", query, tokens))


@pytest.mark.parametrize("extents", [(7,), (5, 5), (3, 3, 3)], ids=["1-D", "2-D", "3-D"])
def test_with_a_kernel_as_large_as_the_grid_it_is_self_attention(extents):
    query, key, value = torch.randn(3, 2, 3, *extents, 8)
    qk, av = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}[len(extents)]
    out = av(qk(query * 8**-0.5, key, extents).softmax(-1), value, extents)
    flat = (tensor.flatten(2, -2) for tensor in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*flat)
    torch.testing.assert_close(out.flatten(2, -2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_every_dtype_is_as_exact_as_its_precision_allows(rank, dtype):
    eps = torch.finfo(dtype).eps
    for problem in at_random(8, rank, 7):
        operands = problem.operands(dtype)
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in operands.items()}
        (attn, out), (exact_attn, exact_out) = ours(problem, operands), by_definition(problem, exact)
        assert attn.dtype == out.dtype == dtype
        finite = ~exact_attn.isneginf()
        assert attn[~finite].isneginf().all()
        assert (attn.double() - exact_attn)[finite].abs().max() <= 8 * eps * exact_attn[finite].abs().max()
        assert (out.double() - exact_out).abs().max() <= 16 * eps * exact_out.abs().max()
        for got, want in zip(gradients(out, operands), gradients(exact_out, exact)):
            assert got.dtype == dtype
            assert (got.double() - want).abs().max() <= 64 * eps * want.abs().max().clamp(min=1)


def test_operands_of_any_strides_are_read_as_they_are():
    problem = Problem(2, 2, (6, 7), (3, 3), (1, 2), (False, False), 4, 4)
    operands = problem.operands()
    attn, out = ours(problem, operands)
    qkv = torch.stack([operands[name].detach() for name in ("query", "key", "value")]).movedim(0, -2)  # [..., 3, dim]
    qkv = qkv.movedim(2, 0).contiguous().movedim(0, 2)
    query, key, value = qkv.unbind(-2)
    assert not query.is_contiguous()
    wide = torch.full((*attn.shape[:-1], 20), torch.nan, dtype=torch.float64)
    wide[..., 4:13] = na2d_qk(query, key, 3, (1, 2)).softmax(-1)
    view = wide.split([4, 9, 7], -1)[1]
    assert not view.is_contiguous()
    torch.testing.assert_close(na2d_av(view, value, 3, (1, 2)), out)
    upside_down = query.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(na2d_qk(upside_down, key, 3, (1, 2)), attn)
    one = operands["key"].detach()[:1, :1].expand(2, 2, -1, -1, -1)
    torch.testing.assert_close(na2d_qk(query, one, 3), na2d_qk(query, one.contiguous(), 3))


def test_what_is_in_a_slot_without_a_key_does_not_matter():
    attn, value = torch.rand(1, 1, 6, 3, requires_grad=True), torch.randn(1, 1, 6, 2, requires_grad=True)
    out = na1d_av(attn, value, 3, is_causal=True)
    spoilt = attn.detach().clone()
    spoilt[0, 0, 0, 1:] = torch.nan
    spoilt[0, 0, 1, 2] = torch.inf
    spoilt.requires_grad_()
    out_of_spoilt = na1d_av(spoilt, value, 3, is_causal=True)
    torch.testing.assert_close(out_of_spoilt, out)
    expected, got = (torch.autograd.grad(o.sum(), (a, value)) for o, a in ((out, attn), (out_of_spoilt, spoilt)))
    torch.testing.assert_close(got, expected)
    assert got[0][0, 0, 0].tolist()[1:] == [0, 0]
    assert got[0][0, 0, 1, 2] == 0


def test_results_and_gradients_are_the_same_from_run_to_run_in_torchs_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    problem = Problem(2, 2, (20, 30), (5, 7), (2, 1), (False, False), 8, 8, tokens=3, rpb=True)
    runs = []
    for _ in range(2):
        operands = problem.operands(torch.float32)
        attn, out = ours(problem, operands)
        runs.append([attn, out, *gradients(out, operands)])
    assert all(torch.equal(one, other) for one, other in zip(*runs))


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 5, 0)], ids=str)
def test_empty_operands(shape):
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    attn = na1d_qk(query, key, 3, is_causal=True)
    assert attn.shape == (*shape[:-1], 3)
    out = na1d_av(attn.softmax(-1), value, 3, is_causal=True)
    assert out.shape == shape
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert grad.shape == shape
    if shape[-1] == 0:
        assert attn[0, 0, 0].tolist() == [0, -torch.inf, -torch.inf]


def test_the_blocks_that_are_made_are_bounded(blocks_of, monkeypatch):
    made = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: made.append(out) or real(a, b, out=out))
    blocks_of(4, 2500)
    na2d_qk(*torch.randn(2, 2, 3, 40, 40, 4), 5)
    assert len(made) > 50
    assert max(pairs.numel() for pairs in made) <= 2500


def test_the_package_has_them_at_its_top():
    assert attn_natten.na2d_qk is na2d_qk
    assert attn_natten.na3d_av is na3d_av
