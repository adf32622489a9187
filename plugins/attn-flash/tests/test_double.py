"""The double of FA2's extension: what its documentation says, by pictures and by a brute force; and its traps."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from brute_force import CLOSE, GRADIENTS_CLOSE, LSE_CLOSE, attend, of_rules
from extension_calls import HALF, Extension, operands, randn
from flash_doubled import DOUBLE, installed_from


@pytest.fixture(scope="module")
def cuda():
    """The double of the extension."""
    with installed_from(DOUBLE):
        yield Extension(importlib.import_module("flash_attn_2_cuda"))


def drawn(cuda, seqlen_q, seqlen_k, **rules):
    """A row of text per query, with a block for each key that it sees: with equal scores and value 1 at its key."""
    q, k = torch.zeros(1, seqlen_q, 1, 16, dtype=HALF), torch.zeros(1, seqlen_k, 1, 16, dtype=HALF)
    v = torch.eye(seqlen_k, 16, dtype=HALF).view(1, seqlen_k, 1, 16)
    [weights] = cuda.fwd(q, k, v, **rules)[0][:, :, 0, :seqlen_k]
    return [" ".join("█" if weight > 0 else "·" for weight in row) for row in weights]


CORNERS = {
    "causal, fewer queries than keys: the last query sees the last key": (
        {"causal": True},
        ["█ █ █ █ ·", "█ █ █ █ █"],
    ),
    "causal, more queries than keys: the first queries see none": (
        {"causal": True},
        ["· ·", "· ·", "· ·", "█ ·", "█ █"],
    ),
    "no limit": ({"left": -1, "right": -1}, ["█ █ █", "█ █ █"]),
    "a window has left + 1 + right keys": (
        {"left": 1, "right": 1},
        ["█ █ · · ·", "█ █ █ · ·", "· █ █ █ ·", "· · █ █ █", "· · · █ █"],
    ),
    "a window of (2, 0) has three keys": (
        {"left": 2, "right": 0},
        ["█ · · · ·", "█ █ · · ·", "█ █ █ · ·", "· █ █ █ ·", "· · █ █ █"],
    ),
    "a window starts at the bottom right": (
        {"left": 1, "right": 0},
        ["· · █ █ ·", "· · · █ █"],
    ),
    "a window without a left limit": (
        {"left": -1, "right": 1},
        ["█ █ · ·", "█ █ █ ·", "█ █ █ █", "█ █ █ █"],
    ),
    "a window without a right limit": (
        {"left": 1, "right": -1},
        ["█ █ █ █", "█ █ █ █", "· █ █ █", "· · █ █"],
    ),
    "causal within a window": (
        {"left": 1, "right": 3, "causal": True},
        ["█ · · ·", "█ █ · ·", "· █ █ ·", "· · █ █"],
    ),
}


@pytest.mark.parametrize(("rules", "picture"), CORNERS.values(), ids=CORNERS.keys())
def test_a_query_sees_the_keys_that_the_documentation_draws(cuda, rules, picture):
    assert drawn(cuda, len(picture), len(picture[0].split()), **rules) == picture


TRAPS = {
    "a right limit of seqlen_k is none: the first queries should see none": (
        {"left": -1, "right": 2},
        ["█ █"] * 6,
    ),
    "no right limit beside a left one is seqlen_k: all queries should see all": (
        {"left": 1, "right": -1},
        ["· ·", "· ·", "█ ·", "█ █", "█ █", "█ █"],
    ),
}


@pytest.mark.parametrize(("rules", "picture"), TRAPS.values(), ids=TRAPS.keys())
def test_with_more_queries_than_keys_windows_do_what_the_extension_does(cuda, rules, picture):
    assert drawn(cuda, len(picture), len(picture[0].split()), **rules) == picture


LIMITS = [
    pytest.param(seqlen_q, seqlen_k, left, right, id=f"{seqlen_q} x {seqlen_k}, ({left}, {right})")
    for seqlen_q, seqlen_k in ((4, 4), (2, 5), (5, 2), (1, 3), (3, 1))
    for left in (-1, 0, 1, 2)
    for right in (-1, 0, 1)
    if seqlen_q <= seqlen_k + 1 or (right < seqlen_k and not right < 0 <= left)  # else one of the traps
]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "left", "right"), LIMITS)
def test_limits_below_seqlen_k_are_as_documented(cuda, seqlen_q, seqlen_k, left, right):
    def sees(i, j):
        place = i + seqlen_k - seqlen_q
        return (left < 0 or j >= place - left) and (right < 0 or j <= place + right)

    picture = [" ".join("█" if sees(i, j) else "·" for j in range(seqlen_k)) for i in range(seqlen_q)]
    assert drawn(cuda, seqlen_q, seqlen_k, left=left, right=right) == picture


# Numbers, beside the brute force

PROBLEMS = {
    "all keys": {},
    "causal": {"causal": True},
    "a window": {"left": 2, "right": 1},
    "softcap": {"softcap": 0.7},
    "ALiBi": {"slopes": [0.5, 0.25, 0.125, 0.0625]},
    "ALiBi of each batch entry, in a window": {
        "slopes": [[0.5, 0.25, 0.125, 0.0625], [0.1, 0.2, 0.3, 0.4]],
        "left": 3,
        "right": 1,
    },
    "softcap and ALiBi": {"softcap": 0.7, "slopes": [0.5, 0.25, 0.125, 0.0625], "left": 9},
    "a scale": {"scale": 0.6},
}
LENGTHS = {"as many queries as keys": (6, 6), "fewer queries": (3, 7), "one query": (1, 5)}


def told(problem):
    return problem | ({"slopes": torch.tensor(problem["slopes"])} if "slopes" in problem else {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_output_and_lse_are_those_of_the_brute_force(cuda, problem, lengths, dtype):
    q, k, v = operands(2, *lengths, dtype=dtype)
    rules = told(problem)
    out, lse, *_ = cuda.fwd(q, k, v, **rules)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    unit = 1 if dtype == HALF else 8  # eight times as coarse
    for b in range(2):
        want, want_lse = of_rules(q[b], k[b], v[b], b, rules)
        torch.testing.assert_close(out[b].double(), want, atol=unit * 2e-3, rtol=unit * 2e-3)
        if "slopes" not in rules or not rules.get("causal"):
            torch.testing.assert_close(lse[b].double(), want_lse, **LSE_CLOSE)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("problem", [*PROBLEMS.values()], ids=PROBLEMS.keys())
def test_gradients_are_those_of_the_brute_force(cuda, problem, lengths):
    q, k, v = operands(2, *lengths)
    dout = randn(*q.shape, seed=9)
    rules = told(problem)
    out, lse, *_ = cuda.fwd(q, k, v, **rules)
    grads = cuda.bwd(dout, q, k, v, out, lse, **rules)
    for b in range(2):
        leaves = [x[b].double().requires_grad_() for x in (q, k, v)]
        of_rules(*leaves, b, rules)[0].backward(dout[b].double())
        for name, got, leaf in zip(("dq", "dk", "dv"), grads, leaves):
            torch.testing.assert_close(got[b].double(), leaf.grad, **GRADIENTS_CLOSE, msg=lambda text, n=name: n + text)


def test_the_gradients_are_written_where_they_are_wanted(cuda):
    q, k, v = operands(1, 3, 4)
    out, lse, *_ = cuda.fwd(q, k, v)
    into = [torch.full_like(x, 7.0) for x in (q, k, v)]
    made = cuda.bwd(out, q, k, v, out, lse, into=into)
    assert all(torch.equal(a, b) and not (a == 7).all() for a, b in zip(into, made))


def test_a_query_that_sees_no_key_has_output_0_an_lse_of_inf_and_no_gradient(cuda):
    q, k, v = operands(1, 5, 2)
    out, lse, *_ = cuda.fwd(q, k, v, causal=True)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == math.inf).all()
    assert lse[..., 3:].isfinite().all()
    dq, dk, dv = cuda.bwd(torch.ones_like(q), q, k, v, out, lse, causal=True)
    assert (dq[:, :3] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_where_there_are_no_keys_at_all_every_row_is_empty(cuda):
    q, k, v = operands(1, 3, 0)
    out, lse, *_ = cuda.fwd(q, k, v)
    assert (out == 0).all()
    assert (lse == math.inf).all()


def test_alibi_beside_a_causal_flag_shifts_the_lse_and_nothing_else(cuda):
    q, k, v = operands(1, 4, 6)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    flagged = cuda.fwd(q, k, v, slopes=slopes, causal=True)
    window = cuda.fwd(q, k, v, slopes=slopes, left=5, right=0)
    torch.testing.assert_close(flagged[0], window[0], **CLOSE)
    diagonal = torch.arange(4) + 6 - 4
    torch.testing.assert_close(flagged[1], window[1] + slopes[:, None] * diagonal, **LSE_CLOSE)
    want, want_lse = attend(q[0], k[0], v[0], causal=True, slopes=slopes)
    torch.testing.assert_close(window[0][0].double(), want, **CLOSE)
    torch.testing.assert_close(window[1][0].double(), want_lse, **LSE_CLOSE)


def test_a_scale_is_applied_behind_the_mask(cuda):
    q, k, v = operands(1, 3, 3)
    assert cuda.fwd(q, k, v, scale=0.0)[0].isfinite().all()
    assert cuda.fwd(q, k, v, scale=0.0, causal=True)[0][:, 0].isnan().all()  # 0 * -inf
    assert not cuda.fwd(q, k, v, scale=-1.0, causal=True)[0][:, 0].isfinite().any()  # -1 * -inf
