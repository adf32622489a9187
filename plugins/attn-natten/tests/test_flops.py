"""Counting FLOPs: by formula, and by torch's FlopCounterMode, fused and unfused, forward and backward."""

from __future__ import annotations

import math
import subprocess
import sys

import attn_natten
import pytest
import torch
from attn_natten import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    fna_flop_count,
    na2d,
    na_av_flop_count,
    na_qk_flop_count,
)
from attn_natten.flops.formulas import ShapeError
from torch.utils.flop_counter import FlopCounterMode

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


def operands(*extents, batch=1, heads=2, kv_heads=None, dim=8, dim_v=None, **options):
    sizes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, dim_v or dim))
    return tuple(torch.randn(batch, *extents, *size, **options) for size in sizes)


# By formula


def test_a_small_module_by_hand():
    shape = (1, 8, 8, 4, 32)
    attention = fna_flop_count(shape, shape, shape, (3, 3), (1, 1), (False, False), True)
    assert attention == 294_912
    assert attention + 2 * 64 * (3 * 128 * 128 + 128 * 128) == 8_683_520
    assert fna_flop_count(shape, shape, shape, 3, 1, False, True, return_macs=True) == 147_456


def test_layouts_say_the_same_about_the_same_call():
    last, first = (2, 5, 6, 7, 4, 16), (2, 4, 5, 6, 7, 16)
    window = ((3, 3, 5), (1, 2, 1), (False, True, False))
    assert fna_flop_count(last, last, last, *window, True) == fna_flop_count(first, first, first, *window, False)


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_both_products_count_as_much_as_the_whole(rank):
    extents, kernel = (9, 8, 7)[:rank], (3, 5, 4)[:rank]
    shape, weights = (2, 3, *extents, 16), (2, 3, *extents, math.prod(kernel))
    window = (kernel, 1, False, False)
    qk, av = na_qk_flop_count(shape, shape, *window), na_av_flop_count(weights, shape, *window)
    assert qk == av == 2 * 2 * 3 * math.prod(extents) * math.prod(kernel) * 16
    assert fna_flop_count(shape, shape, shape, *window) == qk + av
    for count, shapes in (
        (na_qk_flop_count, (shape, shape)),
        (na_av_flop_count, (weights, shape)),
        (fna_flop_count, (shape,) * 3),
    ):
        assert 2 * count(*shapes, *window, return_macs=True) == count(*shapes, *window)


def test_masks_and_dilation_change_nothing():
    shape = (1, 20, 2, 8)
    plain = fna_flop_count(shape, shape, shape, 5, 1, False, True)
    assert fna_flop_count(shape, shape, shape, 5, 4, True, True) == plain
    assert fna_flop_count(shape, shape, shape, (5,), None, None, True) == plain
    assert fna_flop_count(torch.Size(shape), list(shape), shape, 5, 1, False, True) == plain


def test_values_of_another_width_count_by_their_own():
    weights, value = (1, 2, 20, 5), (1, 2, 20, 24)
    assert na_av_flop_count(weights, value, 5, 1, False, False) == 2 * 2 * 20 * 5 * 24


def test_additional_tokens_are_weights_like_others():
    shape, more = (3, 20, 2, 8), 7
    window = (5, 1, False, True)
    extra = 2 * 2 * 3 * 2 * 20 * more * 8
    plain = fna_flop_count(shape, shape, shape, *window)
    assert fna_flop_count(shape, shape, shape, *window, additional_tokens=more) == plain + extra
    assert na_qk_flop_count(shape, shape, *window, additional_tokens=more) == (plain + extra) // 2
    weights = (3, 20, 2, 5 + more)
    assert na_av_flop_count(weights, shape, *window, additional_tokens=more) == (plain + extra) // 2


@pytest.mark.parametrize(
    ("count", "shapes", "message"),
    [
        (fna_flop_count, [(1, 9, 2, 8), (1, 9, 2, 8), (1, 9, 2, 4)], "q_shape, k_shape, v_shape: must be equal, got"),
        (na_qk_flop_count, [(1, 9, 2, 8), (1, 8, 2, 8)], r"k_shape=\(1, 8, 2, 8\)"),
        (na_qk_flop_count, [(1, 2, 8)] * 2, r"takes a shape of 4, 5 or 6 dimensions, got 3: \(1, 2, 8\)"),
        (na_qk_flop_count, [(1, 2, 3, 4, 5, 6, 7)] * 2, "takes a shape of 4, 5 or 6 dimensions, got 7"),
        (na_av_flop_count, [(1, 9, 2, 5), (1, 9, 2, 8)], r"a_shape: .* 3 weights .*, \(1, 9, 2, 3\); got"),
    ],
    ids=["values", "keys", "too few", "too many", "weights"],
)
def test_shapes_that_are_not_of_one_call_are_assertion_errors(count, shapes, message):
    with pytest.raises(AssertionError, match=message) as caught:
        count(*shapes, 3, 1, False, True)
    assert isinstance(caught.value, ShapeError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": (3, 3)}, r"kernel_size: .* got \(3, 3\)"),
        ({"dilation": "2"}, "dilation: .* got '2'"),
        ({"is_causal": 1}, "is_causal: .* got 1"),
        ({"is_heads_last": None}, "is_heads_last: takes True or False, got None"),
        ({"additional_tokens": -1}, "additional_tokens: takes an int >= 0, got -1"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_are_named(changes, message):
    shape = (1, 9, 2, 8)
    arguments = {"kernel_size": 3, "dilation": 1, "is_causal": False, "is_heads_last": True}
    with pytest.raises(ValueError, match=message):
        fna_flop_count(shape, shape, shape, **(arguments | changes))


# By torch's counter

CASES = {
    "line": ((12,), {"kernel_size": 5, "dilation": 2}),
    "plane": ((8, 8), {"kernel_size": 3}),
    "plane causal": ((8, 9), {"kernel_size": (3, 5), "is_causal": (True, False)}),
    "plane relative": ((8, 9), {"kernel_size": 3, "rel_pos_bias": True}),
    "window over everything": ((5, 5), {"kernel_size": 5}),
    "space": ((4, 5, 6), {"kernel_size": (3, 3, 5)}),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_a_module_counts_its_projections_and_the_formula(name, fused, gradients):
    extents, parameters = CASES[name]
    batch, heads, channels = 2, 4, 32
    module = MODULES[len(extents)](channels, heads, **parameters)
    x = torch.randn(batch, *extents, channels)
    attn_natten.use_fused_na(fused, kv_parallel=False)
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        out = module(x)
    want = module(x)
    torch.testing.assert_close(out, want)
    tokens = math.prod(extents)
    shape = (batch, *extents, heads, channels // heads)
    attention = fna_flop_count(shape, shape, shape, parameters["kernel_size"], 1, False, True)
    assert counter.get_total_flops() == 2 * batch * tokens * 4 * channels**2 + attention


def test_the_small_module_by_hand_is_counted_so():
    module, x = NeighborhoodAttention2D(128, 4, 3), torch.randn(1, 8, 8, 128)
    for fused in (False, True):
        attn_natten.use_fused_na(fused, kv_parallel=False)
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == 8_683_520


@pytest.mark.parametrize("kernel", ["torch/tiled", "torch/math", "torch/flash", "torch/reference"])
def test_the_count_of_a_fused_call_does_not_depend_on_the_kernel(kernel):
    x = operands(8, 9)
    with FlopCounterMode(display=False) as counter:
        out = na2d(*x, kernel_size=3, backend=kernel)
    assert counter.get_total_flops() == 2 * 2 * 2 * 72 * 9 * 8
    torch.testing.assert_close(out, na2d(*x, kernel_size=3))


def test_additional_keys_value_widths_and_shared_key_heads_are_counted():
    query, key, value = operands(8, 9, heads=4, kv_heads=2, dim=8, dim_v=16)
    keys, values = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 16)
    with FlopCounterMode(display=False) as counter:
        out, lse = na2d(
            query, key, value, kernel_size=3, additional_keys=keys, additional_values=values, return_lse=True
        )
    assert counter.get_total_flops() == 2 * 4 * 72 * (9 + 5) * (8 + 16)
    want = na2d(query, key, value, kernel_size=3, additional_keys=keys, additional_values=values, return_lse=True)
    torch.testing.assert_close((out, lse), want)


def test_a_backward_counts_two_and_a_half_times_its_forward_and_gives_its_gradients():
    x = operands(8, 9, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    more = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(2)]
    leaves = [*x, rpb, *more]

    def loss():
        out, lse = na2d(*x, kernel_size=3, rpb=rpb, additional_keys=more[0], additional_values=more[1], return_lse=True)
        return out.square().sum() + lse.sin().sum()

    want = torch.autograd.grad(loss(), leaves)
    with FlopCounterMode(display=False) as counter:
        value = loss()
    forward = counter.get_total_flops()
    assert forward == 2 * 2 * 2 * 72 * (9 + 4) * 8
    with FlopCounterMode(display=False) as counter:
        got = torch.autograd.grad(value, leaves)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.attn_natten.fna_backward] == 2.5 * forward
    torch.testing.assert_close(got, want)


def test_a_gradient_that_nobody_wants_is_not_given():
    query, key, value = operands(8, 9)
    key.requires_grad_()
    with FlopCounterMode(display=False):
        out = na2d(query, key, value, kernel_size=3)
        (got,) = torch.autograd.grad(out.sum(), key)
    (want,) = torch.autograd.grad(na2d(query, key, value, kernel_size=3).sum(), key)
    torch.testing.assert_close(got, want)


def test_counters_within_each_other_count_the_same():
    x = operands(8, 9)
    with FlopCounterMode(display=False) as outer, FlopCounterMode(display=False) as inner:
        na2d(*x, kernel_size=3)
    assert outer.get_total_flops() == inner.get_total_flops() == 2 * 2 * 2 * 72 * 9 * 8


def test_tensors_without_data_are_counted_as_well():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        out = na2d(*operands(8, 9, requires_grad=True), kernel_size=3)
        out.sum().backward()
    assert out.shape == (1, 8, 9, 2, 8)
    assert counter.get_total_flops() == 3.5 * 2 * 2 * 2 * 72 * 9 * 8


def test_a_call_that_is_run_again_for_its_backward_is_counted_again():
    from torch.utils.checkpoint import checkpoint

    x = operands(8, 9, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        checkpoint(lambda *x: na2d(*x, kernel_size=3), *x, use_reentrant=False).sum().backward()
    assert counter.get_total_flops() == (1 + 1 + 2.5) * 2 * 2 * 2 * 72 * 9 * 8


def test_autocast_is_what_it_is_where_nobody_counts():
    x = operands(8, 9, requires_grad=True)
    more = [torch.randn(1, 4, 2, 8) for _ in range(2)]

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            out = na2d(*x, kernel_size=3)
            with_more = na2d(*x, kernel_size=3, additional_keys=more[0], additional_values=more[1])
        return out, with_more, *torch.autograd.grad(out.float().square().sum(), x)

    want = results()
    with FlopCounterMode(display=False):
        got = results()
    assert [one.dtype for one in got] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for one, other in zip(got, want):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_within_a_transform_of_torch_func_a_call_runs_and_says_that_it_is_not_counted(caplog):
    x = [tensor.expand(3, *tensor.shape).clone() for tensor in operands(8, 9)]
    gradients = torch.func.vmap(torch.func.grad(lambda *x: na2d(*x, kernel_size=3).square().sum()))
    want = gradients(*x)
    with FlopCounterMode(display=False):
        got = gradients(*x)
    torch.testing.assert_close(got, want)
    assert "within torch.func transforms are not counted" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_trace_of_torch_jit_runs_for_other_sizes_and_gives_gradients(fused):
    attn_natten.use_fused_na(fused, kv_parallel=False)
    module = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    traced = torch.jit.trace(module, torch.randn(1, 8, 9, 16))
    x = torch.randn(2, 10, 7, 16, requires_grad=True)
    torch.testing.assert_close(traced(x), module(x))
    (got,), (want,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (traced, module))
    torch.testing.assert_close(got, want)


def test_bad_calls_raise_the_same_while_they_are_counted():
    x = operands(8, 9)
    for arguments in ({"kernel_size": 11}, {"kernel_size": 3, "dilation": 5}, {"kernel_size": 3, "rpb": x[0]}):
        with pytest.raises(ValueError) as plain:  # noqa: PT011  (compared with the other)
            na2d(*x, **arguments)
        with FlopCounterMode(display=False), pytest.raises(type(plain.value)) as counted:
            na2d(*x, **arguments)
        assert str(counted.value) == str(plain.value)


def test_a_formula_of_the_users_own_comes_first():
    mapping = {torch.ops.attn_natten.fna: lambda *shapes, out_shape=None, **options: 42}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        na2d(*operands(8, 9), kernel_size=3)
    assert counter.get_total_flops() == 42


def test_a_call_is_no_op_of_its_own_where_nobody_counts(monkeypatch):
    from attn_natten.flops import counted

    def never(*arguments):
        raise AssertionError("nobody counts")

    monkeypatch.setattr(counted, "counted", never)
    x = operands(8, 9)
    na2d(*x, kernel_size=3)
    with FlopCounterMode(display=False), pytest.raises(AssertionError, match="nobody counts"):
        na2d(*x, kernel_size=3)


def test_a_counter_that_was_made_before_the_package_was_imported_counts_all_the_same():
    script = """
import torch
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
with counter:
    import attn_natten
    x = torch.randn(1, 8, 9, 2, 8)
    attn_natten.na2d(x, x, x, kernel_size=3)
    fused = counter.get_total_flops()
    x = x.movedim(-2, 1)
    attn = attn_natten.na2d_qk(x, x, kernel_size=3)
    attn_natten.na2d_av(attn, x, kernel_size=3)
print(fused, counter.get_total_flops())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    count = 2 * 2 * 2 * 72 * 9 * 8
    assert out.split() == [str(count), str(2 * count)]
