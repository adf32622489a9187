"""`mask_mod` and `score_mod`: functions of the user's, with FlexAttention's signatures."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    InputTypeError,
    KernelRefusedError,
    KeyPadding,
    MaskMod,
    ScoreMod,
    Segments,
    TensorBias,
    attention,
    explain,
    kernels,
    mask_mod,
    prefer,
    record,
    reference_attention,
    score_mod,
)

BATCH, HEADS, SEQLEN = 2, 4, 6
DOCUMENT = torch.tensor([0, 0, 1, 1, 1, 2])
LENS = torch.tensor([3, 6])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.linspace(-1, 1, HEADS * (2 * SEQLEN - 1)).reshape(HEADS, 2 * SEQLEN - 1)


@mask_mod
def same_document(b, h, q_idx, kv_idx):
    return DOCUMENT[q_idx] == DOCUMENT[kv_idx]


@score_mod
def twice_less_distance(score, b, h, q_idx, kv_idx):
    return 2 * score - (q_idx - kv_idx).abs()


@mask_mod(batch=BATCH, num_heads=HEADS)
def some_of_each(b, h, q_idx, kv_idx):
    return (kv_idx < LENS[b]) | (h == q_idx % 4)


def table_entry(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, kv_idx - q_idx + SEQLEN - 1]


MASKS = {
    "document": (same_document, lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k]),
    "batch-and-heads": (some_of_each, lambda b, h, q, k: k < LENS[b] or h == q % 4),
    "batch": (mask_mod(lambda b, h, q, k: k < LENS[b], batch=BATCH), lambda b, h, q, k: k < LENS[b]),
    "head": (mask_mod(lambda b, h, q, k: (q - k).abs() <= h, num_heads=HEADS), lambda b, h, q, k: abs(q - k) <= h),
    "tensors": (
        mask_mod(lambda b, h, q, k, doc: doc[q] == doc[k], tensors=(DOCUMENT,)),
        lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    ),
    "of-queries": (mask_mod(lambda b, h, q, k: q > 2), lambda b, h, q, k: q > 2),
    "partial": (
        mask_mod(functools.partial(lambda b, h, q, k, *, width: q - k < width, width=2)),
        lambda b, h, q, k: q - k < 2,
    ),
}
SCORES = {
    "decorated": (twice_less_distance, lambda s, b, h, q, k: 2 * s - abs(q - k)),
    "heads": (score_mod(lambda s, b, h, q, k: s * SLOPES[h]), lambda s, b, h, q, k: s * SLOPES[h]),
    "table": (score_mod(table_entry), lambda s, b, h, q, k: s + TABLE[h, k - q + SEQLEN - 1]),
    "batch": (score_mod(lambda s, b, h, q, k: s + LENS[b] * (q - k)), lambda s, b, h, q, k: s + LENS[b] * (q - k)),
    "masking": (
        score_mod(lambda s, b, h, q, k: torch.where(k < q, s, float("-inf"))),
        lambda s, b, h, q, k: s if k < q else float("-inf"),
    ),
    "without-the-score": (score_mod(lambda s, b, h, q, k: (q * k).float() / 9), lambda s, b, h, q, k: q * k / 9),
    "tensors": (
        score_mod(lambda s, b, h, q, k, slopes: s * slopes[h], tensors=(SLOPES,)),
        lambda s, b, h, q, k: s * SLOPES[h],
    ),
}


def by_loops(rule, *first):
    """One value per (b, h, q, k), each by a call with plain numbers."""
    values = torch.empty(BATCH, HEADS, SEQLEN, SEQLEN, dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        values[tuple(place)] = float(rule(*(x[tuple(place)] for x in first), *place))
    return values


def operands(requires_grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, SEQLEN, HEADS, 8), (BATCH, SEQLEN, 2, 8), (BATCH, SEQLEN, 2, 8))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def logits(query, key, softcap=None):
    by_head = query.double().transpose(1, 2) @ key.double().repeat_interleave(2, 2).transpose(1, 2).mT * 8**-0.5
    return by_head if softcap is None else softcap * torch.tanh(by_head / softcap)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_by_a_function_is_its_own_loops(name):
    mask, rule = MASKS[name]
    want = by_loops(rule) != 0
    bound = mask.bind(SEQLEN, SEQLEN)
    assert torch.equal(bound.materialize().expand(want.shape), want)
    assert torch.equal((mask & Causal()).bind(SEQLEN, SEQLEN).materialize().expand(want.shape), want.tril())
    assert bound.normalize() is bound


@pytest.mark.parametrize("name", [kernel.name for kernel in kernels("torch/*")])
@pytest.mark.parametrize("which", MASKS)
def test_every_kernel_that_takes_a_mask_by_a_function_is_right(which, name):
    mask, rule = MASKS[which]
    query, key, value = operands()
    if explain(query, key, value, mask, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it here")
    want = reference_attention(query, key, value, by_loops(rule) != 0)[0].float()
    torch.testing.assert_close(attention(query, key, value, mask, kernel=name), want)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", ["torch/reference", "torch/flex"])
@pytest.mark.parametrize("which", SCORES)
def test_every_kernel_that_takes_a_score_by_a_function_is_right(which, name, softcap):
    bias, rule = SCORES[which]
    query, key, value = operands()
    changed = by_loops(rule, logits(query, key, softcap))
    no_logits = torch.zeros_like(query)
    want = reference_attention(no_logits, key, value, changed)[0].float()
    torch.testing.assert_close(attention(query, key, value, bias, softcap=softcap, kernel=name), want)
    causal = changed.masked_fill(torch.ones(SEQLEN, SEQLEN).triu(1).bool(), float("-inf"))
    want = reference_attention(no_logits, key, value, causal)[0].float()
    torch.testing.assert_close(attention(query, key, value, Causal() + bias, softcap=softcap, kernel=name), want)


def test_a_score_comes_before_the_mask_of_a_sum_so_it_never_sees_what_is_masked():
    query, key, value = operands()
    seen = []

    def finite(score, b, h, q_idx, kv_idx):
        seen.append(bool(score.isfinite().all()))
        return score * 0

    attention(query, key, value, Causal() + score_mod(finite), kernel="torch/reference")
    assert seen == [True]


@pytest.mark.parametrize("bias", [twice_less_distance, twice_less_distance + Causal()], ids=["alone", "sum"])
def test_kernels_of_dense_biases_refuse_a_function_of_the_logit(bias):
    query, key, value = operands()
    text = str(explain(query, key, value, bias))
    assert "torch/flash        refused      bias: takes" in text
    assert "got ScoreMod(twice_less_distance)" in text
    assert explain(query, key, value, bias).chosen is not None
    with pytest.raises(KernelRefusedError, match=r"bias: takes .*, got ScoreMod\(twice_less_distance\)"):
        attention(query, key, value, bias, kernel="torch/math")
    assert not bias.has_dense_form
    with pytest.raises(InputError, match="has no dense form"):
        twice_less_distance.bind(SEQLEN, SEQLEN).materialize()


# Gradients


def test_gradients_through_a_score_are_those_of_numbers():
    query, key, value = operands(True, torch.float64)
    table = TABLE.double().clone().requires_grad_()
    declared = torch.rand(HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def run(query, key, value, table, declared):
        bias = score_mod(
            lambda s, b, h, q, k, slopes: torch.sin(s) * slopes[h] + table[h, k - q + SEQLEN - 1], tensors=(declared,)
        )
        return attention(query, key, value, bias + Causal(), softcap=2.0, kernel="torch/reference")

    small = [tensor[:1, :4].detach().requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(run, (*small, table, declared), fast_mode=True)


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(SLOPES.clone())

    def forward(self, score, b, h, q_idx, kv_idx):
        return score * self.slopes[h]


LEARNED = SLOPES.clone().requires_grad_()
TABLES = {"slopes": [LEARNED]}
MODULE = Learned()


def helper(h):
    return LEARNED[h]


def of_global(s, b, h, q, k):
    return s * LEARNED[h]


def of_helper(s, b, h, q, k):
    return s * helper(h)


def of_container(s, b, h, q, k):
    return s * TABLES["slopes"][0][h]


def of_default(s, b, h, q, k, slopes=LEARNED):
    return s * slopes[h]


def of_a_nested_function(s, b, h, q, k):
    def scaled(score):
        return score * LEARNED[h]

    return scaled(s)


CAPTURES = {
    "closure": (lambda learned: lambda s, b, h, q, k: s * learned[h])(LEARNED),
    "global": of_global,
    "helper": of_helper,
    "container": of_container,
    "default": of_default,
    "nested": of_a_nested_function,
    "partial": functools.partial(lambda learned, s, b, h, q, k: s * learned[h], LEARNED),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_a_gradient_reaches_a_captured_tensor(name):
    query, key, value = operands()
    bias = score_mod(CAPTURES[name])
    assert bias.requires_grad
    with prefer("torch/flex"), record() as calls:
        out = attention(query, key, value, bias)
    (grad,) = torch.autograd.grad(out.square().sum(), LEARNED)
    slopes = SLOPES.double().requires_grad_()
    dense = logits(query, key) * slopes[:, None, None]
    right = reference_attention(torch.zeros_like(query), key, value, TensorBias(dense))[0]
    torch.testing.assert_close(grad, torch.autograd.grad(right.square().sum(), slopes)[0].float())
    assert [row.kernel for row in calls] == ["torch/reference"]  # the other has no backward here
    with torch.no_grad(), record() as calls, prefer("torch/flex"):
        attention(query, key, value, bias)
    assert [row.kernel for row in calls] == ["torch/flex"]


@pytest.mark.parametrize("function", [MODULE, MODULE.forward], ids=["module", "method"])
def test_a_gradient_reaches_the_parameters_of_a_module(function):
    query, key, value = operands()
    bias = score_mod(function)
    assert bias.requires_grad
    attention(query, key, value, bias).sum().backward()
    assert MODULE.slopes.grad.abs().sum() > 0
    MODULE.slopes.grad = None
    MODULE.slopes.requires_grad_(False)
    assert not bias.requires_grad  # asked at every call
    MODULE.slopes.requires_grad_(True)


def test_a_mask_has_no_gradient_and_needs_none():
    query, key, value = operands()
    limit = torch.tensor(2.5, requires_grad=True)
    mask = mask_mod(lambda b, h, q, k: (q - k).abs() < limit)
    assert not mask.requires_grad
    assert not attention(query, key, value, mask).requires_grad


# Values


@pytest.mark.parametrize("bias", [same_document, twice_less_distance, some_of_each], ids=lambda bias: repr(bias))
def test_a_decorated_function_is_pickled_by_its_name(bias):
    for value in (bias, bias.bind(SEQLEN, SEQLEN)):
        restored = pickle.loads(pickle.dumps(value))
        assert restored == value
        assert restored.function is value.function
        assert restored.lengths == value.lengths
        assert copy.deepcopy(value) == value


def test_a_function_at_the_top_of_a_module_is_pickled_and_a_lambda_is_refused_by_python():
    bias = score_mod(table_entry)
    assert pickle.loads(pickle.dumps(bias)) == bias
    with_tensors = mask_mod(functools.partial(helper_mask, width=2), tensors=(DOCUMENT,))
    assert pickle.loads(pickle.dumps(with_tensors)).tensors[0].equal(DOCUMENT)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(mask_mod(lambda b, h, q, k: q > k))


def helper_mask(b, h, q, k, document, width=1):
    return (document[q] == document[k]) & (q - k < width)


def test_a_decorated_function_is_called_as_before():
    q, k = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(same_document(None, None, q, k), DOCUMENT[q] == DOCUMENT[k])
    assert twice_less_distance(torch.tensor(3.0), None, None, torch.tensor(1), torch.tensor(4)) == 3
    assert repr(same_document) == "MaskMod(same_document)"
    assert repr(some_of_each) == "MaskMod(some_of_each, batch=2, num_heads=4)"
    assert repr(twice_less_distance.bind(6, 6)) == "ScoreMod(twice_less_distance).bind(6, 6)"
    assert same_document.bind(6, 6).draw().splitlines()[0] == "██····"


@pytest.mark.parametrize("make", [mask_mod, score_mod], ids=["mask_mod", "score_mod"])
def test_equal_is_the_same_function_with_the_same_tensors(make):
    def one(*arguments):
        return arguments[-1] > 0

    def other(*arguments):
        return arguments[-1] > 0

    tensor = torch.arange(3.0)
    assert make(one) == make(one)
    assert make(one) != make(other)
    assert make(one, tensors=(tensor,)) == make(one, tensors=(tensor.clone(),))
    assert make(one, tensors=(tensor,)) != make(one, tensors=(tensor + 1,))
    assert make(one) != make(one, tensors=(tensor,))
    assert make(one) + Causal() != make(other) + Causal()
    if make is mask_mod:
        assert make(one) & Causal() != make(other) & Causal()
        assert make(one, batch=2) != make(one)


def test_its_tensors_move_with_it_and_a_problem_keeps_neither_data_nor_function():
    bias = score_mod(lambda s, b, h, q, k, slopes: s * slopes[h], tensors=(LEARNED,)).bind(6, 6)
    assert bias.to(torch.float64).tensors[0].dtype is torch.float64
    bare = bias.without_data()
    assert bare.tensors[0].is_meta
    assert bare.key != bias.key  # another device
    assert repr(bare) == repr(bias)
    with pytest.raises(InputError, match="known by its name alone"):
        bare.apply(torch.zeros(1, 4, 6, 6))
    masked = mask_mod(lambda b, h, q, k: q > k).bind(6, 6).without_data()
    with pytest.raises(InputError, match="known by its name alone"):
        masked.materialize()


def test_what_a_call_keeps_holds_neither_the_function_nor_what_it_captures():
    query, key, value = operands()

    def call(kernel):
        document = DOCUMENT.clone()
        bias = mask_mod(lambda b, h, q, k: document[q] == document[k])
        attention(query, key, value, bias, kernel=kernel)
        return weakref.ref(bias.function), weakref.ref(document)

    for kernel in ("torch/flash", "torch/reference"):
        kept = call(kernel)
        gc.collect()
        assert [reference() for reference in kept] == [None, None]


def test_another_function_of_the_same_look_is_not_taken_from_the_table_and_edits_are_seen():
    query, key, value = operands()
    document = DOCUMENT.clone()
    for width in (1, 2, 3):
        mask = mask_mod(lambda b, h, q, k, width=width: (q - k).abs() < width)
        want = attention(query, key, value, mask.bind(6, 6).materialize())
        torch.testing.assert_close(attention(query, key, value, mask), want)
    mask = mask_mod(lambda b, h, q, k: document[q] == document[k])
    torch.testing.assert_close(attention(query, key, value, mask), attention(query, key, value, Segments([2, 3, 1])))
    document.copy_(torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(attention(query, key, value, mask), attention(query, key, value, Segments([3, 3])))


def test_padding_beside_a_function_is_not_read():
    query, key, value = operands()
    want = reference_attention(query, key, value, KeyPadding([3, 6]) & same_document)[0].float()
    key[0, 3:] = value[0, 3:] = float("nan")
    torch.testing.assert_close(attention(query, key, value, KeyPadding([3, 6]) & same_document), want)


# Traced


def built(query, key, value, document):
    @mask_mod
    def same(b, h, q_idx, kv_idx):
        return document[q_idx] == document[kv_idx]

    return attention(query, key, value, same & Causal("top-left"))


def built_score(query, key, value, slopes):
    bias = score_mod(lambda s, b, h, q, k: s * slopes[h]) + Causal("top-left")
    return attention(query, key, value, bias)


@pytest.mark.parametrize(
    ("kernel", "dynamic"),
    [("torch/flash", None), ("torch/reference", True), ("torch/flex", None)],
    ids=["flash", "reference-dynamic", "flex"],
)
def test_functions_are_traced_built_inside_or_passed_in(kernel, dynamic):
    torch._dynamo.reset()
    inputs = operands()
    options = {"fullgraph": True, "dynamic": dynamic, "backend": "eager"}
    wanted = kernel if kernel != "torch/flash" else "torch/reference"  # of functions of the logit
    with prefer(kernel), torch.no_grad():
        for function, argument, takes in (
            (built, DOCUMENT, kernel),
            (attention, some_of_each, kernel),
            (built_score, SLOPES, wanted),
            (attention, twice_less_distance, wanted),
        ):
            want = function(*inputs, argument)
            with record() as calls:
                torch.testing.assert_close(torch.compile(function, **options)(*inputs, argument), want)
            assert [row.kernel for row in calls] == [takes]


def test_one_graph_serves_functions_that_are_made_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    inputs = operands()
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    for document in (DOCUMENT, DOCUMENT + 1, DOCUMENT // 2):
        torch.testing.assert_close(compiled(*inputs, document), built(*inputs, document))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_gradient_reaches_a_captured_tensor_in_a_graph():
    torch._dynamo.reset()
    inputs = operands(requires_grad=True)
    slopes = SLOPES.clone().requires_grad_()
    compiled = torch.compile(built_score, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs, slopes).square().sum(), (*inputs, slopes))
    want = torch.autograd.grad(built_score(*inputs, slopes).square().sum(), (*inputs, slopes))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_in_a_graph_no_kernel_without_a_backward_takes_what_may_need_one(dynamic):
    inputs = operands()
    slopes = SLOPES.clone().requires_grad_()
    for grad, kernel in ((True, "torch/reference"), (False, "torch/flex")):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad), prefer("torch/flex"), record() as calls:
            compiled = torch.compile(built_score, fullgraph=True, dynamic=dynamic, backend="eager")
            torch.testing.assert_close(compiled(*inputs, slopes), built_score(*inputs, slopes))
        assert {row.kernel for row in calls} == {kernel}


def test_functions_are_exported():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, document):
            return built(query, key, value, document)

    inputs = (*operands(), DOCUMENT)
    exported = torch.export.export(Model(), inputs).module()
    torch.testing.assert_close(exported(*inputs), built(*inputs))


# Bad input


def branching(b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return q_idx == kv_idx
    return q_idx < 3


FAILING = {
    "branching": (branching, InputError, r"mask_mod branching failed: Boolean value .* write & \| ~ and torch\.where"),
    "min": (lambda b, h, q, k: min(q, k) > 2, InputError, r"torch\.minimum for min\(\)"),
    "number": (lambda b, h, q, k: int(q) > 2, InputError, "failed: .*convert"),
    "indexed-twice": (
        lambda b, h, q, k: torch.ones(2, 9)[b][q] > 0,
        InputError,
        r"doc\[b, q\] for doc\[b\]\[q\]",
    ),
    "integers": (lambda b, h, q, k: q - k, InputTypeError, "must return a boolean tensor, got torch.int64"),
    "plain": (lambda b, h, q, k: True, InputTypeError, "must return a boolean tensor, got bool"),
    "rows": (
        lambda b, h, q, k: torch.ones(3, SEQLEN).bool(),
        InputError,
        r"shape \[3, 6\], .* \[1, 1, 6, 6\]: seqlen_q must be 1 or 6, got 3",
    ),
    "columns": (lambda b, h, q, k: torch.ones(7).bool(), InputError, "seqlen_kv must be 1 or 6, got 7"),
    "heads": (lambda b, h, q, k: torch.ones(3, 1, 1).bool(), InputError, "num_heads must be 1 or 1, got 3"),
    "rank": (
        lambda b, h, q, k: torch.ones(1, 1, 1, 1, 1, 1, 1).bool(),
        InputError,
        "returned 7 dimensions for .* of 4",
    ),
    "by-batch": (lambda b, h, q, k: k < LENS[b], InputError, r"varies by batch entry \(b\).*say batch="),
    "by-head": (lambda b, h, q, k: k < h, InputError, r"varies by head \(h\).*say num_heads="),
    "by-both": (lambda b, h, q, k: k < h + b, InputError, r"varies by head \(h\)"),
    "index": (lambda b, h, q, k: LENS[q] > k, InputError, "failed: index 2 is out of bounds"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_mask_function_that_cannot_be_is_named(name):
    function, error, text = FAILING[name]
    query, key, value = operands()
    with pytest.raises(error, match=text):
        attention(query, key, value, mask_mod(function))


@pytest.mark.parametrize("name", ["by-batch", "by-head", "by-both"])
@pytest.mark.parametrize("kernel", ["torch/flash", "torch/flex", "torch/reference"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "with-others"])
def test_no_kernel_takes_one_batch_entry_or_head_for_all(name, kernel, joined):
    mask = mask_mod(FAILING[name][0])
    query, key, value = operands()
    with pytest.raises(InputError, match="varies by"):
        attention(query, key, value, mask & KeyPadding([6, 6]) if joined else mask, kernel=kernel)


def test_in_a_graph_no_kernel_takes_one_batch_entry_or_head_for_all():
    query, key, value = operands()
    for kernel in ("torch/flash", "torch/flex"):
        torch._dynamo.reset()
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        with prefer(kernel), pytest.raises(Exception, match="varies by batch entry"):
            compiled(query, key, value, mask_mod(lambda b, h, q, k: k < LENS[b]))


SCORE_FAILING = {
    "branching": (lambda s, b, h, q, k: s if q > k else -s, InputError, "score_mod .* failed: Boolean value"),
    "integers": (lambda s, b, h, q, k: q - k, InputTypeError, "must return a floating tensor, got torch.int64"),
    "plain": (lambda s, b, h, q, k: 1.0, InputTypeError, "must return a floating tensor, got float"),
    "rows": (lambda s, b, h, q, k: torch.ones(3, 1), InputError, "seqlen_q must be 1 or 6, got 3"),
    "batch": (lambda s, b, h, q, k: torch.ones(5, 1, 1, 1), InputError, "batch must be 1 or 2, got 5"),
    "rank": (lambda s, b, h, q, k: s[None], InputError, "returned 5 dimensions for indices of 4"),
    "heads": (lambda s, b, h, q, k: s * torch.ones(3)[h], InputError, "failed: index 3 is out of bounds"),
}


@pytest.mark.parametrize("name", SCORE_FAILING)
def test_a_score_function_that_cannot_be_is_named(name):
    function, error, text = SCORE_FAILING[name]
    query, key, value = operands()
    with pytest.raises(error, match=text):
        attention(query, key, value, score_mod(function))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: mask_mod("causal"), InputTypeError, r"takes a function \(b, h, q_idx, kv_idx\), got str"),
        (lambda: mask_mod(lambda q, k: q > k), InputTypeError, r"must take \(b, h, q_idx, kv_idx\)"),
        (lambda: score_mod(lambda b, h, q, k: q), InputTypeError, r"must take \(score, b, h, q_idx, kv_idx\)"),
        (lambda: mask_mod(branching, tensors=(DOCUMENT,)), InputTypeError, r"kv_idx, \*tensors"),
        (lambda: score_mod(table_entry, tensors=([1],)), InputTypeError, "must be tensors, got list at index 0"),
        (lambda: mask_mod(branching, batch=0), InputError, "batch must be an int >= 1, or None .* got 0"),
        (lambda: mask_mod(branching, num_heads=2.0), InputError, r"num_heads must be an int >= 1, .* got 2\.0"),
        (lambda: mask_mod(branching, batch="2"), InputError, "batch must be an int >= 1, or None .* got '2'"),
        (
            lambda: mask_mod(branching, tensors=DOCUMENT),
            InputTypeError,
            "must be a tuple of tensors, got Tensor",
        ),
        (
            lambda: score_mod(table_entry, tensors=None),
            InputTypeError,
            "must be a tuple of tensors, got NoneType",
        ),
        (lambda: MaskMod(branching).bind(3, 3).bind(3, 4), InputError, "was made for seqlen_q=3, seqlen_kv=3"),
        (lambda: ScoreMod(table_entry).bind(3, 3).bind(4, 3), InputError, "was made for seqlen_q=3, seqlen_kv=3"),
        (lambda: attention(*operands(), mask_mod(branching, batch=3)), InputError, "made for batch=3, got batch=2"),
        (lambda: attention(*operands(), mask_mod(branching, num_heads=2)), InputError, "made for num_heads=2, got"),
        (lambda: attention(*operands(), twice_less_distance & Causal()), InputTypeError, "only masks intersect"),
        (lambda: attention(*operands(), Causal() & twice_less_distance), InputTypeError, "only masks intersect"),
    ],
    ids=[
        "no-function",
        "two-arguments",
        "no-score",
        "tensors-not-taken",
        "no-tensors",
        "batch-0",
        "heads-float",
        "batch-string",
        "a-tensor",
        "no-tuple",
        "rebind-mask",
        "rebind-score",
        "other-batch",
        "other-heads",
        "score-and-mask",
        "mask-and-score",
    ],
)
def test_what_does_not_fit_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
