"""Under autocast the operands are cast once, at the door, as F.scaled_dot_product_attention casts them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attn_core import Causal, TensorBias, attention, explain, record, scaled_dot_product_attention


def operands(dtype=torch.float32, *, requires_grad=False, seqlen_kv=7):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 16), (2, 4, seqlen_kv, 16), (2, 4, seqlen_kv, 16))
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes)


def heads_last(*tensors):
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_drop_in_casts_as_torch_does(dtype, to):
    x = operands(dtype)
    with torch.autocast("cpu", dtype=to):
        wanted = F.scaled_dot_product_attention(*x, is_causal=True)
        got = scaled_dot_product_attention(*x, is_causal=True)
    assert got.dtype is wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=8 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_casts_too_and_leaves_float64_alone(dtype):
    x = heads_last(*operands(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*x)
        told = explain(*x)
    assert out.dtype is (torch.float64 if dtype is torch.float64 else torch.bfloat16)
    assert told.problem.dtype is out.dtype


def test_float64_is_computed_in_float64_under_autocast():
    x = heads_last(*operands(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*x)
    assert torch.equal(out, attention(*x))


def test_mixed_dtypes_meet_in_the_autocast_dtype():
    query, key, value = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.scaled_dot_product_attention(query, key.bfloat16(), value.half())
        got = scaled_dot_product_attention(query, key.bfloat16(), value.half())
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel", ["torch/flash", "torch/math", "torch/reference"])
def test_gradients_come_back_in_the_operands_own_dtype(kernel):
    x, y = operands(requires_grad=True), operands(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.scaled_dot_product_attention(*x, is_causal=True)
        got = attention(*heads_last(*y), Causal("top-left"), kernel=kernel).transpose(1, 2)
    fed = torch.ones_like(wanted)
    for one, two in zip(torch.autograd.grad(wanted, x, fed), torch.autograd.grad(got, y, fed)):
        assert one.dtype is two.dtype is torch.float32
        torch.testing.assert_close(two, one, rtol=0.05, atol=0.05)


def test_a_float_mask_under_autocast_means_what_it_means_in_torch():
    x = operands()
    mask = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.scaled_dot_product_attention(*x, attn_mask=mask)
        got = scaled_dot_product_attention(*x, attn_mask=mask)
    assert got.dtype is wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


def test_a_mask_that_needs_a_gradient_gets_one_under_autocast():
    x = operands()
    mask = torch.zeros(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*heads_last(*x), TensorBias(mask))
    (gradient,) = torch.autograd.grad(out.float().square().sum(), mask)
    assert gradient.dtype is torch.float32
    assert gradient.abs().sum() > 0


def test_the_lse_stays_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(*heads_last(*operands()), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_leaving_autocast_leaves_its_choice_behind():
    x = heads_last(*operands())
    before = attention(*x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*x).dtype is torch.bfloat16
        with torch.autocast("cpu", dtype=torch.float16):
            assert attention(*x).dtype is torch.float16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(attention(*x), before)
    assert torch.equal(attention(*x), before)


def test_autocast_of_another_device_changes_nothing():
    x = heads_last(*operands())
    before = attention(*x)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=True):
        assert torch.equal(attention(*x), before)


def test_the_row_of_a_record_has_the_dtype_that_ran():
    with record() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        attention(*heads_last(*operands()))
    (row,) = calls
    assert row.problem.dtype is torch.bfloat16
