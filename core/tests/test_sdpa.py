"""scaled_dot_product_attention is torch's: the same results, gradients and refusals, in every leading shape."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    Window,
    attention,
    prefer,
    record,
    scaled_dot_product_attention,
)

INF = float("inf")
#: (query, key, value, enable_gqa), each [..., seqlen, head_dim].
SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 8), False),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 8), False),
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), False),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), False),
    "6-D": ((2, 1, 3, 4, 5, 8), (2, 1, 3, 4, 7, 8), (2, 1, 3, 4, 7, 8), False),
    "grouped heads": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), True),
    "grouped heads in 3-D": ((4, 5, 8), (2, 7, 8), (2, 7, 8), True),
    "grouped heads in 5-D": ((2, 3, 4, 5, 8), (2, 3, 1, 7, 8), (2, 3, 1, 7, 8), True),
    "one key head, without enable_gqa": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), False),
    "one query head for many key heads": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), False),
    "one batch entry of keys": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8), False),
    "one batch entry of queries": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), False),
    "key and value broadcast against each other": ((2, 4, 5, 8), (2, 1, 7, 8), (1, 4, 7, 8), False),
    "a key of fewer dimensions": ((2, 4, 5, 8), (7, 8), (7, 8), False),
    "a query of fewer dimensions": ((5, 8), (2, 4, 7, 8), (2, 4, 7, 8), False),
    "windows in the fifth": ((2, 6, 4, 5, 8), (1, 1, 4, 7, 8), (2, 1, 4, 7, 8), False),
    "another head_dim_v": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), False),
    "one query": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 8), False),
    "one key": ((2, 4, 5, 8), (2, 4, 1, 8), (2, 4, 1, 8), False),
}


def operands(shapes, *, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes)


def assert_agree(shapes, gqa=False, *, dtype=torch.float32, **options):
    """Same result and gradients as torch; float64 for the gradients' sake."""
    ours, theirs = operands(shapes, dtype=dtype, requires_grad=True), operands(shapes, dtype=dtype, requires_grad=True)
    wanted = F.scaled_dot_product_attention(*theirs, enable_gqa=gqa, **options)
    got = scaled_dot_product_attention(*ours, enable_gqa=gqa, **options)
    assert got.shape == wanted.shape
    assert got.dtype is wanted.dtype
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, wanted, **near)
    fed = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(got, ours, fed), torch.autograd.grad(wanted, theirs, fed)
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, **near)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_leading_shape_gives_what_torch_gives(name, is_causal):
    query, key, value, gqa = SHAPES[name]
    assert_agree((query, key, value), gqa, is_causal=is_causal, dtype=torch.float64)


MASKS = {
    "full": (2, 4, 5, 7),
    "per batch entry": (2, 1, 5, 7),
    "per head": (1, 4, 5, 7),
    "3-D": (4, 5, 7),
    "3-D of one": (1, 5, 7),
    "2-D": (5, 7),
    "per key": (1, 7),
    "per key and batch entry": (2, 1, 1, 7),
    "per query": (5, 1),
}


def mask_of(shape, kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(shape, generator=generator) > 0.3
    if kind == "boolean":
        return keep
    return torch.randn(shape, generator=generator).to(dtype).masked_fill(~keep, -INF if kind == "with -inf" else -3.0)


@pytest.mark.parametrize("kind", ["boolean", "floating", "with -inf"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_shape_gives_what_torch_gives(name, kind):
    assert_agree(SHAPES["4-D"][:3], attn_mask=mask_of(MASKS[name], kind), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        ("2-D", (5, 7)),
        ("3-D", (5, 7)),
        ("3-D", (3, 5, 7)),
        ("3-D", (1, 7)),
        ("5-D", (2, 3, 4, 5, 7)),
        ("5-D", (3, 1, 5, 7)),
        ("5-D", (1, 1, 4, 5, 7)),
        ("5-D", (4, 5, 7)),
        ("5-D", (2, 3, 1, 1, 7)),
        ("5-D", (5, 7)),
        ("windows in the fifth", (6, 1, 5, 7)),
        ("windows in the fifth", (2, 1, 4, 5, 7)),
        ("one batch entry of queries", (3, 1, 5, 7)),
        ("a query of fewer dimensions", (2, 4, 5, 7)),
        ("one key head, without enable_gqa", (2, 4, 1, 7)),
        ("grouped heads", (2, 4, 5, 7)),
        ("grouped heads in 3-D", (4, 5, 7)),
    ],
    ids=str,
)
def test_masks_broadcast_in_every_rank_as_in_torch(shapes, mask):
    *given, gqa = SHAPES[shapes]
    for kind in ("boolean", "floating"):
        assert_agree(given, gqa, attn_mask=mask_of(mask, kind), dtype=torch.float64)


def test_random_calls_give_what_torch_gives():
    generator = torch.Generator().manual_seed(3)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(60):
        batch, heads, n, m, dim = one_of(1, 2, 3), one_of(1, 2, 4), one_of(1, 5, 16), one_of(1, 7, 33), one_of(1, 8, 20)
        kv_heads = one_of(1, heads)
        shapes = (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, one_of(dim, 4))
        options = one_of(
            {},
            {"is_causal": True},
            {"attn_mask": mask_of((batch, heads, n, m), "boolean")},
            {"attn_mask": mask_of((n, m), "with -inf")},
            {"scale": 0.3},
        )
        assert_agree(shapes, gqa=kv_heads != heads, dtype=torch.float64, **options)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 5), (1, 7), (7, 1)], ids=str)
def test_is_causal_with_unequal_lengths_is_top_left(n, m):
    query, key, value = operands(((2, 4, n, 8), (2, 4, m, 8), (2, 4, m, 8)))
    got = scaled_dot_product_attention(query, key, value, is_causal=True)
    heads_last = [x.transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(got, attention(*heads_last, Causal("top-left")).transpose(1, 2))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_a_mask_beside_is_causal_is_an_error_that_says_what_to_do():
    x = operands(SHAPES["4-D"][:3])
    with pytest.raises(InputError, match="attn_mask: must be None where is_causal=True; put the causal mask"):
        scaled_dot_product_attention(*x, attn_mask=torch.ones(5, 7, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 1, 3.5], ids=str)
def test_every_scale_is_honoured_and_zero_is_one(scale):
    assert_agree(SHAPES["4-D"][:3], scale=scale, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, -0.7], ids=str)
def test_a_causal_call_with_a_scale_of_zero_or_below_is_right_where_torch_gives_nan(scale):
    """torch's CPU kernel masks before it scales, and 0 * -inf is NaN."""
    query, key, value = operands(SHAPES["4-D"][:3])
    got = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    keep = torch.ones(5, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_of_finfo_min_averages_where_everything_is_masked(dtype):
    """As models write their masks: a row of it must not become a row of -inf, whatever the operands' dtype."""
    query, key, value = (x.to(dtype) for x in operands(SHAPES["4-D"][:3]))
    mask = torch.zeros(5, 7)
    mask[2] = torch.finfo(torch.float32).min
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.isfinite(out).all()
    # What is added is so large that the logits vanish beside it: all keys weigh the same.
    mean = value.float().mean(2)
    torch.testing.assert_close(out[:, :, 2].float(), mean, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_in_finfo_min_of_the_operands_dtype_hides_like_torch(dtype):
    query, key, value = (x.to(dtype) for x in operands(SHAPES["4-D"][:3]))
    keep = torch.ones(5, 7, dtype=torch.bool).tril()
    mask = torch.zeros(5, 7, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    got = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(got, scaled_dot_product_attention(query, key, value, attn_mask=keep))


def test_a_boolean_row_of_nothing_gives_zero_as_in_torch():
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[1] = False
    x = operands(SHAPES["4-D"][:3])
    out = scaled_dot_product_attention(*x, attn_mask=keep)
    assert (out[:, :, 1] == 0).all()
    assert_agree(SHAPES["4-D"][:3], attn_mask=keep, dtype=torch.float64)


@pytest.mark.parametrize("shapes", ["2-D", "4-D", "5-D", "one key head, without enable_gqa"])
def test_a_mask_gets_its_gradient(shapes):
    *given, gqa = SHAPES[shapes]
    x = operands(given, dtype=torch.float64)
    ours, theirs = (mask_of((5, 7), "floating").requires_grad_() for _ in range(2))
    got = scaled_dot_product_attention(*x, attn_mask=ours, enable_gqa=gqa)
    wanted = F.scaled_dot_product_attention(*x, attn_mask=theirs, enable_gqa=gqa)
    (one,), (two,) = (torch.autograd.grad(out.square().sum(), mask) for out, mask in ((got, ours), (wanted, theirs)))
    torch.testing.assert_close(one, two)


REFUSED = {
    "a vector": (((8,), (7, 8), (7, 8)), {}, r"query: must be \[\.\.\., seqlen, head_dim\], got shape \[8\]"),
    "head counts that do not fit": (
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        {},
        "num_heads .*4.* got 2.*gqa",
    ),
    "head counts that do not divide": (
        ((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        {"enable_gqa": True},
        "num_heads",
    ),
    "batches that do not fit": (((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)), {}, r"\[2, 4, 5, 8\], \[3, 4, 7, 8\]"),
    "head_dims that differ": (((2, 4, 5, 8), (2, 4, 7, 9), (2, 4, 7, 9)), {}, "key: head_dim must be query's 8, got 9"),
    "a mask that does not broadcast": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        {"attn_mask": torch.zeros(5, 6)},
        r"shape \[5, 6\] does not broadcast to .*seqlen_q=5, seqlen_kv=7",
    ),
    "a mask of other heads": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        {"attn_mask": torch.zeros(3, 5, 7)},
        "made for num_heads=3, got num_heads=4",
    ),
    "a mask of more dimensions than the operands": (
        ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
        {"attn_mask": torch.zeros(2, 4, 5, 7)},
        r"attn_mask: shape \[2, 4, 5, 7\] does not broadcast to \[num_heads, seqlen_q, seqlen_kv\]",
    ),
    "a mask of other leading dimensions": (
        ((1, 3, 4, 5, 8), (1, 3, 4, 7, 8), (1, 3, 4, 7, 8)),
        {"attn_mask": torch.zeros(2, 3, 4, 5, 7)},
        r"attn_mask: shape \[2, 3, 4, 5, 7\] does not broadcast to \[1, 3, num_heads, seqlen_q, seqlen_kv\]",
    ),
    "a mask of another batch": (
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        {"attn_mask": torch.zeros(3, 1, 5, 7)},
        "made for batch=3, got batch=2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_an_error_here_with_both_numbers(name):
    shapes, options, text = REFUSED[name]
    x = operands(shapes)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*x, **options)
    with pytest.raises(InputError, match=f"(?s){text}"):
        scaled_dot_product_attention(*x, **options)


def test_an_integer_mask_is_refused_as_in_torch():
    x = operands(SHAPES["4-D"][:3])
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*x, attn_mask=torch.ones(5, 7, dtype=torch.int64))
    with pytest.raises(InputTypeError, match=r"boolean .* or a floating one .*got torch\.int64"):
        scaled_dot_product_attention(*x, attn_mask=torch.ones(5, 7, dtype=torch.int64))


def test_a_bias_may_stand_in_place_of_the_mask():
    x = operands(((2, 4, 7, 8),) * 3)
    keep = Window(2, 0).bind(7, 7).materialize()
    wanted = F.scaled_dot_product_attention(*x, attn_mask=keep)
    torch.testing.assert_close(scaled_dot_product_attention(*x, attn_mask=Window(2, 0)), wanted)


def test_the_signature_is_torchs_and_another_name_for_is_causal():
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert list(parameters) == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "causal"),
    ]
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == ["scale", "enable_gqa", "causal"]
    x = operands(SHAPES["4-D"][:3])
    torch.testing.assert_close(
        scaled_dot_product_attention(*x, None, 0.0, True), F.scaled_dot_product_attention(*x, None, 0.0, True)
    )


@pytest.mark.parametrize("name", ["torch/flash", "torch/math", "torch/flex", "torch/reference"])
def test_every_kernel_gives_what_torch_gives(name):
    for mask in (None, mask_of((4, 5, 7), "boolean"), mask_of((2, 1, 1, 7), "with -inf", torch.float32)):
        x = operands(SHAPES["grouped heads"][:3])
        wanted = F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True)
        with prefer(name), record() as calls:
            got = scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True)
        assert list(calls.kernels) == [name]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_dropout_drops_the_stated_share_and_keeps_the_mean():
    torch.manual_seed(0)
    query, key = torch.zeros(2, 4, 64, 8), torch.zeros(2, 4, 64, 8)
    weights = scaled_dot_product_attention(query, key, torch.eye(64).expand(2, 4, 64, 64), dropout_p=0.25)
    torch.testing.assert_close(weights.unique(), torch.tensor([0.0, 1 / 64 / 0.75]))
    number = weights.numel()
    assert abs(float((weights == 0).sum()) - 0.25 * number) < 5 * (0.25 * 0.75 * number) ** 0.5


# What the core does not model goes to torch unchanged, and record says so


class Tagged(torch.Tensor):
    pass


def jagged():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 4, 8, generator=generator) for n in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def nested():
    generator = torch.Generator().manual_seed(0)
    return torch.nested.nested_tensor([torch.randn(4, n, 8, generator=generator) for n in (3, 5)])


def tagged():
    return operands(((2, 4, 5, 8),))[0].as_subclass(Tagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [jagged, nested, tagged])
def test_a_tensor_that_the_core_does_not_model_goes_to_torch_unchanged(make):
    x = make()
    with record() as calls:
        got = scaled_dot_product_attention(x, x, x)
    wanted = F.scaled_dot_product_attention(x, x, x)
    assert type(got) is type(wanted)
    for one, two in zip(got.unbind(), wanted.unbind()):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    (row,) = calls
    assert row.kernel == "torch (stock)"
    assert row.reason.startswith("a ")
    with pytest.raises(InputTypeError, match="query: attention takes plain tensors, got a "):
        attention(x, x, x)


def test_a_subclass_goes_to_torch_after_a_plain_tensor_of_the_same_shape():
    """The choice made for the plain one is not taken for it."""
    plain_one = torch.Tensor(tagged())
    scaled_dot_product_attention(plain_one, plain_one, plain_one)
    with record() as calls:
        assert type(scaled_dot_product_attention(tagged(), plain_one, plain_one)) is Tagged
        scaled_dot_product_attention(plain_one, plain_one, plain_one)
    assert sorted(calls.kernels) == ["torch (stock)", "torch/flash"]


def test_a_parameter_is_a_plain_tensor():
    x = operands(SHAPES["4-D"][:3])
    query = torch.nn.Parameter(x[0])
    out = scaled_dot_product_attention(query, x[1], x[2])
    assert out.requires_grad
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, x[1], x[2]))


# Transforms of torch.func: what works on the plain computation works here


def plain(query, key, value):
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value


def test_vmap_over_the_batch_equals_the_plain_computation():
    x = operands(((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)))
    torch.testing.assert_close(torch.func.vmap(scaled_dot_product_attention)(*x), plain(*x))
    query, key, value = x
    over_queries = torch.func.vmap(scaled_dot_product_attention, in_dims=(0, None, None))(query, key[0], value[0])
    torch.testing.assert_close(over_queries, plain(query, key[0], value[0]))


def test_vmap_over_the_last_dimension_equals_the_plain_computation():
    """What is mapped lies innermost in memory: every operand of the inner call has a strided last dimension."""
    x = operands(((2, 4, 5, 8, 3), (2, 4, 7, 8, 3), (2, 4, 7, 8, 3)))
    got = torch.func.vmap(scaled_dot_product_attention, in_dims=-1, out_dims=-1)(*x)
    wanted = plain(*(y.movedim(-1, 0) for y in x)).movedim(0, -1)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["boolean", "floating"])
def test_vmap_over_masks_equals_a_call_for_each(kind):
    x = operands(SHAPES["4-D"][:3])
    masks = mask_of((3, 5, 7), kind, torch.float32)
    got = torch.func.vmap(lambda mask: scaled_dot_product_attention(*x, attn_mask=mask))(masks)
    wanted = torch.stack([F.scaled_dot_product_attention(*x, attn_mask=mask) for mask in masks])
    torch.testing.assert_close(got, wanted)


def test_vmap_over_attention_equals_the_plain_computation():
    x = operands(((3, 2, 5, 4, 8), (3, 2, 7, 4, 8), (3, 2, 7, 4, 8)))
    wanted = plain(*(y.transpose(2, 3) for y in x)).transpose(2, 3)
    torch.testing.assert_close(torch.func.vmap(attention)(*x), wanted)


def test_func_grad_equals_the_plain_computation():
    x = operands(SHAPES["4-D"][:3], dtype=torch.float64)
    got = torch.func.grad(lambda *y: scaled_dot_product_attention(*y).square().sum(), argnums=(0, 1, 2))(*x)
    wanted = torch.func.grad(lambda *y: plain(*y).square().sum(), argnums=(0, 1, 2))(*x)
    for one, two in zip(got, wanted):
        torch.testing.assert_close(one, two)


def test_per_sample_gradients_equal_the_plain_computation():
    x = operands(((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)), dtype=torch.float64)

    def loss(call):
        return torch.func.vmap(torch.func.grad(lambda *y: call(*y).square().sum()))

    def one(query, key, value):
        return scaled_dot_product_attention(query, key, value)

    torch.testing.assert_close(loss(one)(*x), loss(plain)(*x))


@pytest.mark.parametrize("wrt", [0, 1, 2], ids=["query", "key", "value"])
def test_jvp_equals_the_plain_computation(wrt):
    x = operands(SHAPES["4-D"][:3], dtype=torch.float64)

    def along(call):
        def of_one(y):
            return call(*x[:wrt], y, *x[wrt + 1 :])

        return torch.func.jvp(of_one, (x[wrt],), (x[wrt].cos(),))

    for got, wanted in zip(along(scaled_dot_product_attention), along(plain)):
        torch.testing.assert_close(got, wanted)


def test_forward_ad_inside_dual_level_equals_the_plain_computation():
    import torch.autograd.forward_ad as fwd

    query, key, value = operands(SHAPES["4-D"][:3], dtype=torch.float64)
    with fwd.dual_level():
        dual = fwd.make_dual(query, query.sin())
        got = fwd.unpack_dual(scaled_dot_product_attention(dual, key, value)).tangent
        wanted = fwd.unpack_dual(plain(dual, key, value)).tangent
    torch.testing.assert_close(got, wanted)


def test_the_second_derivative_is_there_where_it_is_asked_for():
    x = operands(((1, 1, 3, 2),) * 3, dtype=torch.float64, requires_grad=True)
    with prefer("torch/math"):
        assert torch.autograd.gradgradcheck(scaled_dot_product_attention, x)


def test_every_pair_of_leading_ranks_agrees_with_torch():
    """Ranks 2 to 5 of query against 2 to 5 of key and value."""
    for one, two in itertools.product(range(2, 6), repeat=2):
        lead = (2, 3, 4)
        query, key = (*lead[3 - (one - 2) :], 5, 8), (*lead[3 - (two - 2) :], 7, 8)
        assert_agree((query, key, key), dtype=torch.float64)


def test_vmap_over_masks_that_are_trained_is_an_error_that_names_the_kernel_or_right_by_another():
    # Within vmap, an operand does not tell that it requires a gradient outside.
    x = operands(SHAPES["4-D"][:3])
    masks = mask_of((3, 5, 7), "floating", torch.float32).requires_grad_()

    def over_masks():
        return torch.func.vmap(lambda mask: scaled_dot_product_attention(*x, attn_mask=mask))(masks)

    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'attn_mask'"):
        over_masks()
    with prefer("torch/math"):
        got = over_masks()
    wanted = torch.stack([F.scaled_dot_product_attention(*x, attn_mask=mask) for mask in masks])
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(got, masks, weights), torch.autograd.grad(wanted, masks, weights))
