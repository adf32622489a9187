"""na1d, na2d, na3d: every form of the call, and what must be the same however it is written."""

from __future__ import annotations

import gc
import weakref

import attn_core
import attn_natten
import pytest
import torch
from attn_core.errors import InputError, InputTypeError, KernelRefusedError, UnknownKernelError
from attn_natten import na1d, na2d, na3d
from attn_natten.errors import ConstraintError, UnknownBackendError, UnsupportedError
from attn_natten.fused import remembered
from torch.nn.functional import scaled_dot_product_attention

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
EXTENTS = {1: (12,), 2: (6, 5), 3: (4, 3, 5)}
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


def operands(*extents, batch=2, heads=2, kv_heads=None, dim=8, dim_v=None, **options):
    sizes = ((heads, dim), (kv_heads or heads, dim), (kv_heads or heads, dim_v or dim))
    return tuple(torch.randn(batch, *extents, *size, **options) for size in sizes)


def heads_first(tensor, rank):
    """`[batch, num_heads, tokens, head_dim]` of `[batch, *spatial, num_heads, head_dim]`."""
    return tensor.flatten(1, rank).transpose(1, 2)


# What the page shows


@pytest.mark.filterwarnings("ignore:is_casual:DeprecationWarning")
def test_calls_of_the_page_run_as_they_are_written():
    assert na1d(*operands(28), kernel_size=7, dilation=4, is_casual=True).shape == (2, 28, 2, 8)
    assert na2d(*operands(28, 28), kernel_size=7, dilation=4, is_casual=False).shape == (2, 28, 28, 2, 8)
    out = na2d(*operands(7, 9), kernel_size=(7, 3), dilation=(1, 3), is_casual=(True, False))
    assert out.shape == (2, 7, 9, 2, 8)
    out = na3d(*operands(7, 3, 6), kernel_size=(7, 3, 5), dilation=(1, 1, 1), is_casual=(True, False, False))
    assert out.shape == (2, 7, 3, 6, 2, 8)


def test_the_misspelled_name_means_is_causal_and_is_deprecated():
    given = operands(9)
    with pytest.warns(DeprecationWarning, match="is_casual is a misspelling") as said:
        got = na1d(*given, 3, is_casual=True)
    assert said[0].filename == __file__
    torch.testing.assert_close(got, na1d(*given, 3, is_causal=True), atol=0, rtol=0)


def test_scaling_the_query_or_query_and_key_beforehand_is_the_same():
    query, key, value = operands(9, 8)
    scale = 8**-0.5
    want = na2d(query, key, value, kernel_size=(7, 3))
    torch.testing.assert_close(na2d(query * scale, key, value, kernel_size=(7, 3), scale=1.0), want)
    both = na2d(query * scale**0.5, key * scale**0.5, value, kernel_size=(7, 3), scale=1.0)
    torch.testing.assert_close(both, want)


# Beside plain attention


@each_rank
@pytest.mark.parametrize("tokens", [0, 3], ids="additional-{}".format)
def test_a_window_of_the_whole_grid_is_plain_attention(rank, tokens):
    extents = EXTENTS[rank]
    leaves = [tensor.requires_grad_() for tensor in operands(*extents)]
    more = [tensor.requires_grad_() for tensor in operands(tokens)[1:]]
    query, key, value = (heads_first(tensor, rank) for tensor in leaves)
    key, value = (torch.cat([x, y.transpose(1, 2)], 2) for x, y in zip((key, value), more))
    want = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(leaves[0].shape)
    got = FUNCTIONS[rank](*leaves, extents, additional_keys=more[0], additional_values=more[1])
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    grads = (torch.autograd.grad((out * weight).sum(), [*leaves, *more]) for out in (got, want))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_window_of_the_whole_grid_and_additional_keys_are_one_attention():
    more = operands(3)[1:]
    with attn_core.record() as calls:
        na2d(*operands(6, 5), (6, 5), additional_keys=more[0], additional_values=more[1])
    assert sum(row.calls for row in calls) == 1


def test_a_causal_window_of_the_whole_line_is_causal_attention():
    query, key, value = operands(12)
    want = scaled_dot_product_attention(*(heads_first(x, 1) for x in (query, key, value)), is_causal=True)
    torch.testing.assert_close(na1d(query, key, value, 12, is_causal=True), want.transpose(1, 2))


def test_additional_keys_are_outside_of_masks_and_rpb():
    query, key, value = operands(6, 5)
    more = operands(4)[1:]
    rpb = torch.full((2, 5, 5), 3.0)  # the same for each key in the window: no effect on its own softmax
    out, lse = na2d(query, key, value, 3, is_causal=True, return_lse=True)
    beside, lse_beside = (x.transpose(1, 2) for x in _plain(query.flatten(1, 2), *more))
    joined, _ = attn_natten.merge_attentions(
        [out.flatten(1, 2), beside.transpose(1, 2)], [lse.flatten(1, 2), lse_beside]
    )
    got = na2d(query, key, value, 3, is_causal=True, additional_keys=more[0], additional_values=more[1])
    torch.testing.assert_close(got.flatten(1, 2), joined)

    out, lse = na2d(query, key, value, 3, return_lse=True)
    lse = lse + 3.0
    joined, lse_joined = attn_natten.merge_attentions(
        [out.flatten(1, 2), beside.transpose(1, 2)], [lse.flatten(1, 2), lse_beside]
    )
    both = {"additional_keys": more[0], "additional_values": more[1]}
    got, got_lse = na2d(query, key, value, 3, rpb=rpb, return_lse=True, **both)
    torch.testing.assert_close(got.flatten(1, 2), joined)
    torch.testing.assert_close(got_lse.flatten(1, 2), lse_joined)


def _plain(query, key, value):
    """(out, lse) heads last and heads first."""
    return attn_core.attention(query, key, value, return_lse=True)


# Layouts, dtypes, options


@each_rank
def test_operands_may_be_views_of_one_projection(rank):
    qkv = torch.randn(2, *EXTENTS[rank], 3, 2, 8)
    got = FUNCTIONS[rank](*qkv.unbind(-3), 3)
    torch.testing.assert_close(got, FUNCTIONS[rank](*(x.contiguous() for x in qkv.unbind(-3)), 3))


@each_rank
def test_operands_may_be_views_that_cannot_be_flattened_without_a_copy(rank):
    extents = EXTENTS[rank]
    given = [torch.randn(2, *extents[::-1], 2, 8).permute(0, *range(rank, 0, -1), rank + 1, rank + 2) for _ in range(3)]
    got = FUNCTIONS[rank](*given, 3)
    torch.testing.assert_close(got, FUNCTIONS[rank](*(x.contiguous() for x in given), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_close_and_its_lse_is_float32(dtype):
    given = [x.to(dtype) for x in operands(8, 8)]
    more = [x.to(dtype) for x in operands(5)[1:]]
    options = {"return_lse": True, "rpb": torch.randn(2, 9, 9)}
    out, lse = na2d(*given, 5, additional_keys=more[0], additional_values=more[1], **options)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    more = [x.double() for x in more]
    want, want_lse = na2d(
        *(x.double() for x in given), 5, additional_keys=more[0], additional_values=more[1], **options
    )
    assert want_lse.dtype is torch.float64
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=0)


def test_a_scale_of_zero_is_honoured():
    query, key, value = operands(9)
    want = na1d(torch.zeros_like(query), key, value, 3)
    torch.testing.assert_close(na1d(query, key, value, 3, scale=0.0), want)


def test_the_table_of_relative_positions_is_not_scaled_and_may_have_another_dtype():
    query, key, value = operands(9)
    rpb = torch.randn(2, 5, dtype=torch.float64)
    got = na1d(query, key, value, 3, rpb=rpb, scale=0.0)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    start = (i - 1).clamp(0, 6)
    logits = rpb.float()[:, (j - i + 2).clamp(0, 4)].masked_fill((j < start) | (j >= start + 3), float("-inf"))
    torch.testing.assert_close(got, torch.einsum("hij,bjhd->bihd", logits.softmax(-1), value))


def test_the_table_of_relative_positions_is_cast_to_the_operands_dtype():
    given = [x.to(torch.bfloat16) for x in operands(9)]
    rpb = torch.randn(2, 5) * 8
    assert torch.equal(na1d(*given, 3, rpb=rpb), na1d(*given, 3, rpb=rpb.to(torch.bfloat16)))


def test_parameters_that_are_none_are_their_defaults():
    given = operands(6, 5)
    torch.testing.assert_close(
        na2d(*given, 3, stride=None, dilation=None, is_causal=None), na2d(*given, (3, 3)), atol=0, rtol=0
    )


def test_a_list_is_as_good_as_a_tuple():
    given = operands(6, 5)
    torch.testing.assert_close(na2d(*given, [3, 5], dilation=[2, 1]), na2d(*given, (3, 5), dilation=(2, 1)))


def test_attention_kwargs_go_to_the_attention_to_additional_keys():
    given, more = operands(6, 5), operands(4)[1:]
    both = {"additional_keys": more[0], "additional_values": more[1]}
    with attn_core.record() as calls:
        got = na2d(*given, 3, **both, backend="torch/tiled", attention_kwargs={"backend": "torch/reference"})
    assert [row.kernel for row in calls] == ["torch/tiled", "torch/reference"]
    torch.testing.assert_close(got, na2d(*given, 3, **both))
    with pytest.raises(InputError, match="attention_kwargs: takes options of attention.. other than 'scale'"):
        na2d(*given, 3, **both, attention_kwargs={"scale": 1.0})


# Backends


def test_a_backend_is_the_kernel_of_that_name_and_its_reasons_are_in_the_error():
    with attn_core.record() as calls:
        na2d(*operands(6, 5), 3, backend="torch/tiled")
    assert [row.kernel for row in calls] == ["torch/tiled"]
    trained = torch.randn(2, 5, 5, requires_grad=True)
    with pytest.raises(KernelRefusedError, match=r"torch/flash.*\n *bias_grad"):
        na2d(*operands(6, 5), 3, rpb=trained, backend="torch/flash")


@pytest.mark.parametrize("backend", ["cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna"])
def test_nattens_backends_are_kernels_of_that_name(backend):
    """This machine has no GPU; where the plugin is not installed, its kernels are unknown."""
    with pytest.raises((KernelRefusedError, UnknownKernelError), match=f"natten/{backend}"):
        na2d(*operands(6, 5, dtype=torch.float64), 3, backend=backend)


def test_an_unknown_backend_is_an_error_that_names_the_known_ones():
    with pytest.raises(UnknownBackendError, match=r"'cutlass-fna'.*got 'cutlas-fna'\. Did you mean 'cutlass-fna'"):
        na2d(*operands(6, 5), 3, backend="cutlas-fna")
    with pytest.raises(InputTypeError, match="backend: takes a name or None, got int"):
        na2d(*operands(6, 5), 3, backend=3)


# Bad input


@pytest.mark.parametrize("function", [na1d, na2d, na3d], ids=lambda function: function.__name__)
def test_what_nattens_versions_order_differently_is_taken_by_keyword_alone(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: takes .* by keyword, got 2 .*: 2, True\. The fifth"):
        function(*operands(6, 5), 3, 2, True)


def bad(change=None, match="", error=ConstraintError, **options):
    return pytest.param(change or (lambda *x: x), options, error, match)


BAD = {
    "key-of-another-shape": bad(lambda q, k, v: (q, k.transpose(1, 2), v), "key: height .* must be query's 6, got 5"),
    "value-of-another-length": bad(lambda q, k, v: (q, k, v[:, :, :4]), "value: width .* must be query's 5, got 4"),
    "batch": bad(lambda q, k, v: (q, k[:1], v), "key: batch .* must be query's 2, got 1"),
    "head-dim": bad(lambda q, k, v: (q, k[..., :4], v), "key: head_dim .* must be query's 8, got 4"),
    "heads": bad(lambda q, k, v: (q[..., :1, :], k, v), "num_heads"),
    "rank": bad(lambda q, k, v: (q[0], k[0], v[0]), "query: must be .* 5 dimensions; got 4"),
    "dtype": bad(lambda q, k, v: (q, k.double(), v), "key: must have query's dtype float32, got float64"),
    "integers": bad(lambda q, k, v: (q.int(), k.int(), v.int()), "query: dtype must be one of"),
    "device": bad(lambda q, k, v: (q, k, v.to("meta")), "value: must be on query's device cpu, got meta"),
    "no-tensor": bad(lambda q, k, v: (q, k, None), "value: takes a tensor, got NoneType", InputTypeError),
    "nested": bad(
        lambda q, k, v: [torch.nested.nested_tensor(list(x)) for x in (q, k, v)], "query: .* nested", UnsupportedError
    ),
    "sparse": bad(lambda q, k, v: (q, k, v.to_sparse()), "value: takes plain tensors", UnsupportedError),
    "kernel-too-large": bad(match="height .* is 6, with kernel_size=3 . dilation=3 = 9", dilation=3),
    "kernel-of-one": bad(match="greater than 1.* got 1", kernel_size=1),
    "kernel-a-bool": bad(match="kernel_size: takes an int", error=InputError, kernel_size=True),
    "kernel-a-float": bad(match="kernel_size: takes an int", error=InputError, kernel_size=3.0),
    "kernel-of-three-axes": bad(match="a tuple of 2 ints", error=InputError, kernel_size=(3, 3, 3)),
    "dilation-a-bool": bad(match="dilation: takes an int", error=InputError, dilation=True),
    "dilation-zero": bad(match="dilation: must be an int >= 1, got 0", dilation=0),
    "stride-too-large": bad(match="stride: must be from 1 to kernel_size=3, got 4", stride=4),
    "causal-an-int": bad(match="is_causal: takes True or False", error=InputError, is_causal=1),
    "two-spellings": bad(match="two names of one argument", error=InputError, is_causal=True, is_casual=True),
    "keys-without-values": bad(
        match="additional_values: takes a tensor", error=InputError, additional_keys=torch.randn(2, 3, 2, 8)
    ),
    "values-without-keys": bad(
        match="additional_keys: takes a tensor", error=InputError, additional_values=torch.randn(2, 3, 2, 8)
    ),
    "additional-of-another-batch": bad(
        match="additional_keys: batch .* must be key's 2, got 1",
        additional_keys=torch.randn(1, 3, 2, 8),
        additional_values=torch.randn(1, 3, 2, 8),
    ),
    "rpb-of-another-shape": bad(match="rpb: dimension 2 .* must be 5, got 4", rpb=torch.randn(2, 5, 4)),
    "rpb-and-causal": bad(match="rpb: .* causal", error=UnsupportedError, rpb=torch.randn(2, 5, 5), is_causal=True),
    "rpb-and-an-even-kernel": bad(match="rpb: .* odd kernel sizes", rpb=torch.randn(2, 7, 7), kernel_size=4),
    "scale": bad(match="scale: takes a number", error=InputTypeError, scale="big"),
}


@pytest.mark.parametrize(("change", "options", "error", "match"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("known", [False, True], ids=["first-call", "shapes-known"])
def test_bad_input_is_an_error_that_names_it(change, options, error, match, known):
    remembered._kept.clear()
    if known:
        na2d(*operands(6, 5), 3)
        na2d(*operands(6, 5), 3, is_causal=True)
        na2d(*operands(6, 5), 3, dilation=1)
    arguments = {"kernel_size": 3} | options
    with pytest.raises(error, match=match) as caught:
        na2d(*change(*operands(6, 5)), **arguments)
    assert isinstance(caught.value, attn_core.AttnError)


def test_constraints_are_the_errors_of_both_nattens():
    for error in (RuntimeError, ValueError):
        with pytest.raises(error):
            na1d(*operands(6), 7)


# Derivatives


@pytest.mark.parametrize("given", ["query", "rpb", "additional_keys"])
def test_forward_mode_is_refused_and_the_unfused_operations_are_named(given):
    query, key, value = operands(6)
    arguments = {"query": query, "rpb": torch.randn(2, 5), "additional_keys": torch.randn(2, 3, 2, 8)}

    def function(primal):
        own = arguments | {given: primal}
        return na1d(key=key, value=value, kernel_size=3, additional_values=torch.randn(2, 3, 2, 8), **own)

    with pytest.raises(NotImplementedError, match="na1d_qk"):
        torch.func.jvp(function, (arguments[given],), (torch.ones_like(arguments[given]),))


def test_gradients_pass_gradcheck():
    options = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": 2, "dtype": torch.float64}
    given = [x.requires_grad_() for x in operands(3, 4, **options)]
    more = [x.requires_grad_() for x in operands(1, **options)[1:]]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, rpb, keys, values):
        return na2d(query, key, value, 3, rpb=rpb, additional_keys=keys, additional_values=values, return_lse=True)

    assert torch.autograd.gradcheck(function, (*given, rpb, *more))


def test_a_gradient_to_a_trained_table_goes_through_the_kernel_that_follows_the_mask():
    given, rpb = operands(32, 32), torch.randn(2, 13, 13, requires_grad=True)
    na2d(*given, 7, rpb=rpb, backend="torch/tiled").square().sum().backward()
    dense = rpb.detach().clone().requires_grad_()
    na2d(*given, 7, rpb=dense, backend="torch/reference").square().sum().backward()
    torch.testing.assert_close(rpb.grad, dense.grad, atol=1e-4, rtol=1e-4)


def test_deterministic_mode_is_honoured():
    given = [x.requires_grad_() for x in operands(16, 16)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(na2d(*given, 5).square().sum(), given) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_autocast_casts_the_operands():
    given = operands(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d(*given, 3).dtype is torch.bfloat16
    assert na2d(*given, 3).dtype is torch.float32


# What is remembered


def test_what_is_remembered_of_calls_is_bounded_and_holds_no_tensor(monkeypatch):
    monkeypatch.setattr(remembered, "KEPT", 8)
    remembered._kept.clear()
    query = torch.randn(1, 4, 1, 2)
    for batch in range(1, 12):
        na1d(*[query.expand(batch, -1, -1, -1)] * 3, 2)
    assert len(remembered._kept) == 8
    gone = weakref.ref(query)
    del query
    gc.collect()
    assert gone() is None


def test_equal_parameters_of_other_tuples_are_the_same_call():
    remembered._kept.clear()
    given = operands(6, 5)
    for _ in range(3):
        na2d(*given, tuple(given[0].new_full((2,), 3).int().tolist()))
    assert len(remembered._kept) == 1


def test_strict_checks_see_calls_that_are_remembered():
    from attn_natten.switches.strict import use_strict_checks

    given = operands(6, 5)
    na2d(*given, 4)
    use_strict_checks()
    try:
        with pytest.raises(ConstraintError, match="odd"):
            na2d(*given, 4)
    finally:
        use_strict_checks(False)
    na2d(*given, 4)
