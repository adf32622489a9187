"""What the how-tos of moving from NATTEN say is different here, row by row."""

from __future__ import annotations

import logging
import math

import attn_core
import attn_natten
import pytest
import torch
from attn_core import KernelRefusedError

SEED = 20261121


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield


def drawn(*shape, count=3):
    return list(torch.randn(count, *shape))


# From 0.17


def test_a_fused_call_has_a_gradient_to_relative_positional_biases():
    query, key, value = drawn(1, 9, 8, 2, 4)
    rpb = torch.randn(2, 9, 9, requires_grad=True)
    out = attn_natten.na2d(query, key, value, kernel_size=5, rpb=rpb)
    [fused] = torch.autograd.grad(out.square().sum(), [rpb])
    q, k, v = (x.movedim(-2, 1) for x in (query, key, value))
    weights = attn_natten.na2d_qk(q * 4**-0.5, k, kernel_size=5, rpb=rpb).softmax(-1)
    out = attn_natten.na2d_av(weights, v, kernel_size=5)
    [unfused] = torch.autograd.grad(out.square().sum(), [rpb])
    torch.testing.assert_close(fused, unfused, atol=1e-5, rtol=1e-5)


def test_training_relative_positional_biases_is_deterministic_and_no_error():
    query, key = drawn(2, 2, 40, 8, count=2)
    rpb = torch.randn(2, 13, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [
            torch.autograd.grad(attn_natten.na1d_qk(query, key, kernel_size=7, rpb=rpb).square().sum(), [rpb])[0]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_on_a_cpu(dtype):
    query, key, value = drawn(1, 2, 12, 8)
    exact = attn_natten.na1d_av(attn_natten.na1d_qk(query, key, 5).softmax(-1), value, 5)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    out = attn_natten.na1d_av(attn_natten.na1d_qk(query, key, 5).softmax(-1), value, 5)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.1)


def test_even_kernel_sizes_are_taken_unless_checks_are_strict():
    query, key, value = drawn(1, 12, 2, 8)
    first = [x.movedim(-2, 1) for x in (query, key)]
    assert attn_natten.na1d(query, key, value, kernel_size=4).shape == query.shape
    assert attn_natten.na1d_qk(*first, kernel_size=4).shape == (1, 2, 12, 4)
    attn_natten.use_strict_checks()
    with pytest.raises(RuntimeError, match="kernel_size"):
        attn_natten.na1d(query, key, value, kernel_size=4)
    with pytest.raises(RuntimeError, match="kernel_size"):
        attn_natten.na1d_qk(*first, kernel_size=4)


def test_additional_keys_without_values_are_an_error():
    query, key, value = drawn(1, 12, 2, 8)
    with pytest.raises(ValueError, match="additional_values"):
        attn_natten.na1d(query, key, value, kernel_size=3, additional_keys=torch.randn(1, 4, 2, 8))


def test_a_scale_of_zero_is_zero():
    query, key, value = drawn(1, 12, 2, 8)
    flat = attn_natten.na1d(torch.zeros_like(query), key, value, kernel_size=5)
    assert torch.equal(attn_natten.na1d(query, key, value, kernel_size=5, scale=0.0), flat)
    layer = attn_natten.NeighborhoodAttention1D(dim=8, num_heads=2, kernel_size=3, qk_scale=0.0)
    assert layer.scale == 0.0


def test_dim_is_a_multiple_of_num_heads():
    with pytest.raises(ValueError, match="embed_dim"):
        attn_natten.NeighborhoodAttention1D(dim=10, num_heads=3, kernel_size=3)


@pytest.mark.parametrize("call", ["na2d", "NeighborhoodAttention2D"])
def test_what_is_behind_kernel_size_by_position_is_refused_with_the_reason(call):
    given = (8, 2, 3) if call.startswith("N") else (*drawn(1, 6, 6, 2, 4), 3)
    with pytest.raises(TypeError, match=r"dilation in\s+NATTEN 0\.17"):
        getattr(attn_natten, call)(*given, 2)


@pytest.mark.filterwarnings("ignore::attn_natten.errors.NoEffectWarning")
def test_dropout_of_weights_is_not_applied_in_fused_modules_and_logged_as_an_error(caplog):
    layer = attn_natten.NeighborhoodAttention1D(dim=8, num_heads=2, kernel_size=3, attn_drop=0.9)
    x = torch.randn(1, 6, 8)
    attn_natten.use_fused_na(True)
    with caplog.at_level(logging.ERROR, "attn_natten"):
        trained = layer(x)
    assert [record.levelname for record in caplog.records if "attn_drop" in record.message] == ["ERROR"]
    torch.testing.assert_close(trained, layer.eval()(x))


def test_small_inputs_are_padded_where_that_is_asked_for():
    arguments = {"dim": 8, "num_heads": 2, "kernel_size": 7}
    x = torch.randn(1, 5, 9, 8)
    with pytest.raises(RuntimeError, match="kernel_size"):
        attn_natten.NeighborhoodAttention2D(**arguments)(x)
    assert attn_natten.NeighborhoodAttention2D(**arguments, pad_small_inputs=True)(x).shape == x.shape


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_constraint_is_the_error_of_0_17_and_that_of_0_20(kind):
    with pytest.raises(kind, match="35"):
        attn_natten.na1d(*drawn(1, 30, 2, 8), kernel_size=7, dilation=5)


# From 0.20 and 0.21


def test_modules_with_a_stride_are_fused_and_others_start_unfused():
    x = torch.randn(1, 12, 8)
    ran = {}
    for stride in (1, 2):
        layer = attn_natten.NeighborhoodAttention1D(embed_dim=8, num_heads=2, kernel_size=3, stride=stride)
        with attn_core.record() as calls:
            layer(x)
        ran[stride] = bool(calls.kernels)
    assert ran == {1: False, 2: True}


def test_a_part_without_keys_leaves_the_other_part_in_a_merge():
    out, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2)
    nothing = torch.full_like(lse, -math.inf)
    merged, joined = attn_natten.merge_attentions([torch.full_like(out, math.nan), out], [nothing, lse])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(joined, lse)
    empty, none = attn_natten.merge_attentions([out, out], [nothing, nothing])
    assert not empty.any()
    assert none.eq(-math.inf).all()


def test_gradients_flow_through_a_merge_of_any_number_of_parts():
    keys, values = drawn(1, 12, 2, 8, count=2)
    query = torch.randn(1, 5, 2, 8, requires_grad=True)
    parts = [attn_natten.attention(query, k, v, return_lse=True) for k, v in zip(keys.split(3, 1), values.split(3, 1))]
    merged, _ = attn_natten.merge_attentions(*zip(*parts))
    [by_parts] = torch.autograd.grad(merged.square().sum(), [query])
    [at_once] = torch.autograd.grad(attn_natten.attention(query, keys, values).square().sum(), [query])
    torch.testing.assert_close(by_parts, at_once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cutlas-fna", "hopper-fmha"])
def test_an_unknown_backend_is_no_implementation(backend):
    with pytest.raises(NotImplementedError, match="'cutlass-fna', 'hopper-fna'"):
        attn_natten.na1d(*drawn(1, 12, 2, 8), kernel_size=3, backend=backend)


def test_a_backend_that_cannot_run_here_says_why():
    if not attn_core.kernels("natten/*"):
        pytest.skip("attn-natten is not installed as a distribution, so its kernels are not registered")
    with pytest.raises(KernelRefusedError, match="natten/hopper-fna"):
        attn_natten.na1d(*drawn(1, 12, 2, 8), kernel_size=3, backend="hopper-fna")


def test_backends_are_kernels_of_attn_too():
    operands = drawn(1, 12, 2, 8)
    with attn_core.record() as calls:
        attn_natten.na1d(*operands, kernel_size=3, backend="torch/math")
    assert calls.kernels == {"torch/math": 1}


def test_an_option_of_a_kernel_that_is_not_named_is_said_once_to_have_no_effect():
    operands = drawn(1, 12, 2, 8)
    plain = attn_natten.na1d(*operands, kernel_size=3)
    with pytest.warns(attn_natten.NoEffectWarning, match="q_tile_shape") as said:
        results = [attn_natten.na1d(*operands, kernel_size=3, q_tile_shape=(32,)) for _ in range(2)]
    assert len(said) == 1
    assert all(torch.equal(result, plain) for result in results)
