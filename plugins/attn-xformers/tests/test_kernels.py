"""xFormers' operators through the core, with pairs of operators for the CPU in place of those for CUDA.

They run by xFormers' own front end, the real one where it is installed, which checks all that it is sent.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import (
    Cached,
    Causal,
    KernelRefusedError,
    KeyPadding,
    Neighborhood,
    Paged,
    Problem,
    Segments,
    TensorBias,
    Window,
    attention,
    explain,
    reference_attention,
)
from attn_core.conformance import check_kernel
from attn_xformers import Manners, kernel_of
from attn_xformers.kernels import asked, forms, read
from attn_xformers.kernels.operands import sent

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import cpu_operators

SEED = 20261121
CLOSE = {"atol": 3e-5, "rtol": 3e-5}
PLAIN = Problem(
    batch=2, seqlen_q=6, seqlen_kv=6, num_heads=4, num_kv_heads=4, head_dim=16, head_dim_v=16, dtype=torch.float32,
    device="cpu", scale=0.25,
)  # fmt: skip
NAMES = list(cpu_operators.ALL)
TRAINED = ["mine/everything", "mine/padded"]


@pytest.fixture(scope="module")
def pairs(fmha):
    """The pairs of operators by name, each registered as a kernel of that name."""
    made = {name: make() for name, make in cpu_operators.ALL.items()}
    handles = [
        attn_core.register(kernel_of(name, each.forward, each.backward, manners=each.manners))
        for name, each in made.items()
    ]
    yield made
    for handle in handles:
        handle.unregister()


def operands(batch, seqlen_q, seqlen_kv, heads=4, kv_heads=4, dim=16, dim_v=None, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((seqlen_q, heads, dim), (seqlen_kv, kv_heads, dim), (seqlen_kv, kv_heads, dim_v or dim))
    return [torch.randn(batch, *shape, generator=generator).requires_grad_() for shape in shapes]


def candidate(name, bias, *operands, **options):
    """What is said of that kernel."""
    return explain(*operands, bias, **options)[name]


def drawn_biases(seqlen_q, seqlen_kv, rng):
    yield None
    for corner in ("top-left", "bottom-right"):
        yield Causal(corner)
        yield Window(3, 0, corner)
        yield Window(2, 1, corner)
    seqlens = [rng.randint(0, seqlen_kv) for _ in range(2)]
    yield KeyPadding(seqlens)
    yield Cached(seqlens, within=Causal("bottom-right"))
    yield Cached(seqlens, within=Window(2, 1, "bottom-right"))
    of_q, of_kv = [seqlen_q - 2, 0, 2], [2, 1, seqlen_kv - 3]
    yield Segments(of_q, of_kv)
    yield Segments(of_q, of_kv, within=Causal("top-left"))
    if seqlen_q == seqlen_kv:
        yield Segments([4, seqlen_q - 4], within=Window(2, 0))
    yield Segments([seqlen_q], [2], starts_kv=[1])
    tensor = torch.randn(2, 1, seqlen_q, seqlen_kv, generator=torch.Generator().manual_seed(SEED))
    yield TensorBias(tensor.masked_fill(tensor < -1, float("-inf")))
    yield TensorBias(tensor[0, 0] > 0)
    yield TensorBias(tensor) + Causal("top-left")
    yield Neighborhood(seqlen_q, kernel_size=3) if seqlen_q == seqlen_kv else None
    table = torch.tensor([[3, 0, 1], [2, 1, -1]])[:, : seqlen_kv // 3]
    if seqlen_kv % 3 == 0 and table.shape[1] == seqlen_kv // 3:
        yield Paged(table, [min(n, 6) for n in seqlens], 3, within=Causal("bottom-right"))


@pytest.mark.parametrize("seed", [SEED], ids="seed {}".format)
@pytest.mark.parametrize("lengths", [(6, 6), (5, 9), (9, 5)], ids="{0[0]} x {0[1]}".format)
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_are_those_of_the_reference(pairs, name, lengths, seed):
    rng = random.Random(seed)
    ran = 0
    for bias in drawn_biases(*lengths, rng):
        kv_heads, dim_v = rng.choice((1, 2, 4)), rng.choice((16, 24))
        query, key, value = operands(2, *lengths, kv_heads=kv_heads, dim_v=dim_v)
        if isinstance(bias, Paged):
            key, value = (x.detach()[:1].reshape(-1, 3, *x.shape[2:])[:3].repeat(2, 1, 1, 1)[:4] for x in (key, value))
            key, value = key.clone().requires_grad_(), value.clone().requires_grad_()
        context = torch.enable_grad() if name in TRAINED else torch.no_grad()
        with context:
            if candidate(name, bias, query, key, value).seconds is None:
                continue
            out = attention(query, key, value, bias, kernel=name)
        ran += 1
        want, want_lse = reference_attention(query, key, value, bias)
        torch.testing.assert_close(out.double(), want, **CLOSE, msg=lambda text: f"{bias!r}: {text}")  # noqa: B023
        if name in TRAINED:
            grad = torch.randn_like(out)
            got = torch.autograd.grad(out, (query, key, value), grad)
            for mine, right in zip(got, torch.autograd.grad(want, (query, key, value), grad.double())):
                torch.testing.assert_close(mine.double(), right.double(), **CLOSE)
        with torch.no_grad():
            if candidate(name, bias, query, key, value, return_lse=True).seconds is None:
                continue
            _, lse = attention(query, key, value, bias, return_lse=True, kernel=name)
        assert lse.dtype is torch.float32
        torch.testing.assert_close(lse.double(), want_lse, **CLOSE, msg=lambda text: f"{bias!r}: {text}")  # noqa: B023
    assert ran > 8


@pytest.mark.parametrize("name", NAMES)
def test_the_kit_finds_nothing_wrong_with_what_is_declared(pairs, name):
    """The quick checks; `every_check_on_cpu_operators.py` has all."""
    quick = ("takes_what_it_claims", "refuses_what_it_does_not_claim", "its_reasons_can_be_read", "never_reads_padding")
    results = [result for check in quick for result in check_kernel(name, only=check)]
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)


# What is declared


def test_a_declaration_is_read_from_class_attributes(pairs):
    [declared] = attn_core.kernel("mine/splitk").declarations
    assert declared.devices == {"cpu"}
    assert declared.dtypes == {torch.float16, torch.float32}
    assert (declared.head_dims, declared.head_dims_v) == (range(1, 257), None)
    assert (declared.gqa, declared.dropout, declared.backward) == (False, False, None)
    assert {TensorBias, Segments} < declared.biases
    [declared] = attn_core.kernel("mine/padded").declarations
    assert (declared.head_dims, declared.head_dims_v) == (range(8, 257, 8), range(8, 257, 8))
    assert (declared.gqa, declared.backward.gqa, declared.dropout) == (True, False, True)
    assert (declared.backward.head_dims, declared.backward.head_dims_v) == (None, None), "as the forward"
    assert declared.backward.bias_grad


def test_what_the_backward_takes_of_heads_and_values_is_read_from_its_own_attributes(fmha):
    made = cpu_operators.pair("alike", types=("None",), SUPPORTS_DIFFERENT_VALUE_EMBED=True, SUPPORTS_BMGHK=True)
    made.backward.SUPPORTS_DIFFERENT_VALUE_EMBED = False
    kernel = kernel_of("mine/alike", made.forward, made.backward)
    [declared] = kernel.declarations
    assert (declared.head_dims_v, declared.backward.head_dims_v) == (declared.head_dims, ())
    assert (declared.gqa, declared.backward.gqa) == (True, made.backward.SUPPORTS_BMGHK)
    values = replace(PLAIN, head_dim_v=32)
    assert kernel.refusals(values) == []
    told = [str(refusal) for refusal in kernel.refusals(replace(values, requires_grad=True))]
    assert told[0] == "backward.head_dims_v: takes head_dim_v equal to head_dim=16 in the backward, got 32"


def test_an_attribute_that_changes_changes_what_is_declared(fmha):
    made = cpu_operators.pair("other", types=("None",), SUPPORTED_MIN_K=32, SUPPORTED_MAX_K=128, IS_DETERMINISTIC=False)
    [declared] = kernel_of("mine/other", made.forward, made.backward).declarations
    assert declared.head_dims == range(32, 129)
    assert not declared.deterministic
    assert not declared.backward.deterministic
    assert declared.biases == frozenset()


def test_sizes_that_are_no_range_are_a_set(fmha):
    made = cpu_operators.pair("powers", types=("None",), backward=False)

    def shapes(cls, Mq, Mkv, K, Kv):  # noqa: N803
        return [] if K in (16, 32, 64) else [f"Embed dim {K} not supported"]

    made.forward.shape_not_supported_reasons = classmethod(shapes)
    [declared] = kernel_of("mine/powers", made.forward).declarations
    assert declared.head_dims == {16, 32, 64}


def test_the_formats_of_the_lse_must_agree(fmha):
    packed, padded = cpu_operators.like_flash(), cpu_operators.like_cutlass()
    text = "backward paddedB takes an LSE of documents that is padded, and forward everythingF gives the other"
    with pytest.raises(ValueError, match=text):
        kernel_of("mine/mixed", packed.forward, padded.backward)


# What is sent


def test_query_heads_that_share_a_key_head_are_sent_in_five_dimensions(pairs):
    query, key, value = operands(2, 5, 7, heads=6, kv_heads=2)
    with torch.no_grad():
        attention(query, key, value, kernel="mine/everything")
    inp = pairs["mine/everything"].forward.calls[-1]
    assert inp.query.shape == (2, 5, 2, 3, 16)
    assert (inp.key.shape, inp.key.stride(3)) == ((2, 7, 2, 3, 16), 0)
    assert inp.key.data_ptr() == key.data_ptr()


def test_with_gradients_key_heads_are_expanded_by_the_core_and_it_is_said(pairs):
    query, key, value = operands(2, 5, 7, heads=6, kv_heads=2)
    assert candidate("mine/everything", None, query, key, value).adaptations == ("expand_kv",)
    with torch.no_grad():
        assert candidate("mine/everything", None, query, key, value).adaptations == ()
        assert candidate("mine/splitk", None, query, key, value).adaptations == ("expand_kv",)


def test_the_default_scale_is_not_sent_since_some_take_no_other(pairs):
    query, key, value = operands(1, 5, 5)
    with torch.no_grad():
        attention(query, key, value, kernel="mine/everything")
        assert pairs["mine/everything"].forward.calls[-1].scale is None
        attention(query, key, value, scale=0.5, kernel="mine/everything")
        assert pairs["mine/everything"].forward.calls[-1].scale == 0.5
        with pytest.raises(KernelRefusedError, match="scale: splitkF says: has custom scale"):
            attention(query, key, value, scale=0.5, kernel="mine/splitk")


def test_the_scale_of_a_padded_head_is_that_of_the_head(pairs):
    query, key, value = operands(1, 5, 5, dim=12)
    out = attention(query, key, value, kernel="mine/padded")
    inp = pairs["mine/padded"].forward.calls[-1]
    assert (inp.query.shape[-1], inp.scale) == (16, 12**-0.5)
    torch.testing.assert_close(out.double(), reference_attention(query, key, value)[0], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_batch_entries_of_a_padded_batch_lie_behind_each_other(pairs, name):
    query, key, value = operands(2, 2, 6)
    with torch.no_grad():
        attention(query, key, value, Cached([3, 6], within=Window(2, 0, "bottom-right")), kernel=name)
    inp = pairs[name].forward.calls[-1]
    if name == "mine/padded":  # it takes no such window: written out
        assert isinstance(inp.attn_bias, torch.Tensor)
        return
    assert inp.query.shape[:2] == (1, 4)
    assert type(inp.attn_bias).__name__ == "BlockDiagonalCausalLocalAttentionPaddedKeysMask"
    assert inp.attn_bias.k_seqinfo.seqlen.tolist() == [3, 6]


def test_a_class_that_an_operator_does_not_take_is_replaced_by_one_that_it_does(pairs):
    query, key, value = operands(2, 6, 6)
    for training, kind in (
        (False, "LowerTriangularFromBottomRightLocalAttentionMask"),
        (True, cpu_operators.DOCUMENTS[3]),
    ):
        with torch.set_grad_enabled(training):
            attention(query, key, value, Window(2, 0), kernel="mine/padded")
        assert type(pairs["mine/padded"].forward.calls[-1].attn_bias).__name__ == kind


def test_operators_are_asked_once_for_calls_that_look_the_same(fmha, monkeypatch):
    made = cpu_operators.like_flash()
    with (
        attn_core.register(kernel_of("mine/asked", made.forward, made.backward, manners=made.manners)),
        torch.no_grad(),
    ):
        query, key, value = operands(2, 6, 6)
        attention(query, key, value, Window(2, 0), kernel="mine/asked")
        times, asks = [], made.forward.not_supported_reasons
        monkeypatch.setattr(made.forward, "not_supported_reasons", lambda inp: times.append(1) or asks(inp))
        out = attention(query, key, value, Window(2, 0), kernel="mine/asked")
        assert len(times) == 1  # by xFormers' front end
        attention(query, key, value, Window(3, 0), kernel="mine/asked")
        assert len(times) > 2
    torch.testing.assert_close(out.double(), reference_attention(query, key, value, Window(2, 0))[0], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head_dim": 257, "head_dim_v": 257}, "head_dim: takes 1 to 256, got 257"),
        ({"dtype": torch.bfloat16}, "dtype: takes float16, float32, got bfloat16"),
        ({"dropout_p": 0.25}, "dropout_p: takes no dropout, got 0.25"),
        ({"scale": -0.5}, "scale: takes a scale above 0, got -0.5"),
        ({"num_kv_heads": 2}, "num_kv_heads: takes num_kv_heads equal to num_heads=4, got 2"),
        ({"device": "cuda", "compute_capability": (9, 0)}, "device: takes cpu, got cuda"),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_taken_and_what_was_asked(pairs, changes, told):
    assert told in [str(refusal) for refusal in attn_core.kernel("mine/splitk").refusals(replace(PLAIN, **changes))]


def test_a_gradient_to_a_bias_is_refused_where_an_operator_gives_none(fmha):
    made = cpu_operators.pair("stingy", types=("None", "Tensor"), SUPPORTS_ATTN_BIAS_GRAD=False)
    made.forward.SUPPORTS_ATTN_BIAS_GRAD = None  # which only a backward has
    bias = TensorBias(torch.empty(6, 6, device="meta").requires_grad_()).bind(6, 6)
    found = kernel_of("mine/stingy", made.forward, made.backward).refusals(
        replace(PLAIN, bias=bias, bias_requires_grad=True)
    )
    assert "bias_grad: gives no gradient to the bias, and one is needed" in [str(refusal) for refusal in found]


def test_rows_that_lie_at_odd_places_are_copied_and_others_are_not(pairs):
    _, key, value = operands(1, 5, 5)
    odd = torch.randn(1, 5, 4, 17)[..., 1:]
    with torch.no_grad():
        out = attention(odd, key, value, kernel="mine/padded")
    inp = pairs["mine/padded"].forward.calls[-1]
    assert inp.query.stride(-2) == 16
    assert inp.key.data_ptr() == key.data_ptr()
    torch.testing.assert_close(out.double(), reference_attention(odd, key, value)[0], **CLOSE)


@pytest.mark.parametrize("seed", [SEED], ids="seed {}".format)
@pytest.mark.parametrize("name", NAMES)
def test_an_operator_is_asked_with_just_what_it_is_sent(pairs, name, seed):
    """Shapes, strides and dtypes of the stand-ins are those of the operands."""
    rng, compared = random.Random(seed), 0
    for seqlen_q, seqlen_kv in ((6, 6), (1, 9), (9, 5)):
        for given in drawn_biases(seqlen_q, seqlen_kv, rng) if seqlen_q > 2 else (None, Cached([3, 4])):
            bias = None if given is None else given.bind(seqlen_q, seqlen_kv).normalize()
            kv_heads = rng.choice((2, 4))
            query, key, value = (x.detach() for x in operands(2, seqlen_q, seqlen_kv, kv_heads=kv_heads))
            held = None if bias is None else bias.without_data()
            changes = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "num_kv_heads": kv_heads, "bias": held}
            problem = replace(PLAIN, **changes)
            pairs_of_forms = zip(
                forms.forms(bias, 2, seqlen_q, seqlen_kv), forms.forms(held, 2, seqlen_q, seqlen_kv), strict=True
            )
            for form, without_data in pairs_of_forms:
                try:
                    stands = asked.stand_ins(problem, without_data, torch.device("cpu"))
                except (ValueError, RuntimeError) as error:
                    with pytest.raises(type(error)):
                        sent(query, key, value, form)
                    continue
                real = sent(query, key, value, form)
                for which in ("query", "key", "value"):
                    one, other = getattr(stands, which), getattr(real, which)
                    assert (one.shape, one.dtype) == (other.shape, other.dtype), (form.kind, which)
                    assert strides_that_count(one) == strides_that_count(other), (form.kind, which)
                tensors = [getattr(x.attn_bias, "_bias", x.attn_bias) for x in (stands, real)]
                if isinstance(tensors[1], torch.Tensor):
                    assert strides_that_count(tensors[0]) == strides_that_count(tensors[1])
                    assert tensors[0].dtype is tensors[1].dtype
                else:
                    assert type(tensors[0]) is type(tensors[1])
                compared += 1
    assert compared > 40


def strides_that_count(tensor):
    """Those of dimensions longer than 1."""
    return [(i, stride) for i, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())) if size > 1]


# Gradients


def test_a_bias_alone_can_be_trained(pairs):
    query, key, value = (x.detach() for x in operands(2, 5, 7))
    tensor = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(SEED)).requires_grad_()
    for name in TRAINED:
        out = attention(query, key, value, TensorBias(tensor), kernel=name)
        grad = torch.randn_like(out)
        [got] = torch.autograd.grad(out, tensor, grad)
        want = reference_attention(query, key, value, TensorBias(tensor))[0]
        torch.testing.assert_close(got.double(), torch.autograd.grad(want, tensor, grad.double())[0].double(), **CLOSE)
    assert query.requires_grad is False


def test_dropout_has_the_gradients_of_what_it_kept(pairs):
    """By the derivative of what is linear in value: the gradient knows the same weights."""
    query, key, value = operands(1, 5, 7)
    for name in TRAINED:
        out = attention(query, key, value, dropout_p=0.4, kernel=name)
        grad = torch.randn_like(out)
        [of_value] = torch.autograd.grad(out, value, grad)
        torch.testing.assert_close((out * grad).sum(), (of_value * value).sum(), **CLOSE)
        assert (out - attention(query, key, value, dropout_p=0.4, kernel=name)).abs().max() > 0.01


# What is refused, and by which field


def fields(name, problem):
    return {refusal.field for refusal in attn_core.kernel(name).refusals(problem)}


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("mine/everything", {"head_dim": 257, "head_dim_v": 257}, "head_dim"),
        ("mine/everything", {"dtype": torch.float64}, "dtype"),
        ("mine/everything", {"scale": 0.0}, "scale"),
        ("mine/everything", {"scale": -1.0}, "scale"),
        ("mine/everything", {"softcap": 2.0}, "softcap"),
        ("mine/everything", {"device": "cuda"}, "device"),
        ("mine/everything", {"compiling": True}, "compiling"),
        ("mine/everything", {"dropout_p": 0.1, "return_lse": True}, "dropout_p"),
        ("mine/everything", {"return_lse": True, "requires_grad": True}, "lse_grad"),
        ("mine/everything", {"num_kv_heads": 2, "requires_grad": True}, "backward.gqa"),
        ("mine/splitk", {"dropout_p": 0.1}, "dropout_p"),
        ("mine/splitk", {"scale": 0.3}, "scale"),
        ("mine/splitk", {"requires_grad": True}, "backward"),
        ("mine/splitk", {"head_dim_v": 8}, "head_dim_v"),
        ("mine/padded", {"head_dim": 12, "head_dim_v": 12}, "head_dim"),
        ("mine/padded", {"seqlen_q": 9, "bias": Causal("bottom-right")}, "bias"),
        ("mine/padded", {"bias": Window(1, 1)}, "bias"),
        ("mine/padded", {"bias": Segments([6], [3], starts_kv=[1])}, "bias"),
        (
            "mine/padded",
            {"bias": Causal("top-left") + TensorBias(torch.zeros(6, 6)), "requires_grad": True},
            "backward.biases",
        ),
        ("mine/padded", {"bias": Causal("top-left") + TensorBias(torch.zeros(6, 6)), "return_lse": True}, "bias"),
    ],
    ids=str,
)
def test_a_refusal_names_its_field(pairs, name, changes, field):
    problem = replace(PLAIN, **changes)
    if problem.bias is not None:
        bias = problem.bias.bind(problem.seqlen_q, problem.seqlen_kv).normalize()
        problem = replace(problem, bias=bias.without_data())
    assert field in fields(name, problem)


def test_an_operator_that_is_nondeterministic_is_refused_where_that_matters(fmha):
    made = cpu_operators.pair("loose", types=("None",), IS_DETERMINISTIC=False)
    kernel = kernel_of("mine/loose", made.forward, made.backward)
    found = {refusal.field for refusal in kernel.refusals(replace(PLAIN, deterministic=True, requires_grad=True))}
    assert {"deterministic", "backward.deterministic"} <= found


def test_one_that_needs_lengths_is_given_some(fmha):
    made = cpu_operators.pair("needy", types=("None", "BlockDiagonalPaddedKeysMask"), backward=False)
    kernel = kernel_of("mine/needy", made.forward, manners=Manners(needs_lengths=True))
    with attn_core.register(kernel):
        query, key, value = operands(2, 5, 7)
        with torch.no_grad():
            out = attention(query, key, value, kernel="mine/needy")
    assert made.forward.calls[-1].attn_bias.k_seqinfo.seqlen.tolist() == [7, 7]
    torch.testing.assert_close(out.double(), reference_attention(query, key, value)[0], **CLOSE)


def test_one_that_gives_no_lse_is_not_asked_for_it(fmha):
    made = cpu_operators.pair("silent", types=("None",), backward=False)
    kernel = kernel_of("mine/silent", made.forward, manners=Manners(gives_lse=False))
    assert "return_lse" in {refusal.field for refusal in kernel.refusals(replace(PLAIN, return_lse=True))}


# Padding, and rows without keys


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_be_anything(pairs, name):
    query, key, value = (x.detach() for x in operands(2, 3, 6))
    for bias in (KeyPadding([2, 5]), Cached([4, 3], within=Causal("bottom-right")), Segments([3], [2], starts_kv=[1])):
        valid = bias.bind(3, 6).valid_keys()
        gone = ~valid[:, :, None, None]
        poisoned = [x.masked_fill(gone, float("nan")) for x in (key, value)]
        with torch.no_grad():
            got = attention(query, *poisoned, bias, kernel=name)
            said = candidate(name, bias, query, *poisoned)
        torch.testing.assert_close(got.double(), reference_attention(query, key, value, bias)[0], **CLOSE)
        assert ("zero_padding" in said.adaptations) == (name != "mine/everything")


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_keys_gets_zeros_whatever_the_operator_gives(pairs, name):
    query, key, value = (x.detach() for x in operands(2, 3, 6))
    for bias in (
        KeyPadding([0, 6]),
        Cached([0, 2], within=Causal("bottom-right")),
        TensorBias(torch.zeros(3, 6, dtype=torch.bool)),
    ):
        with torch.no_grad():
            out, lse = attention(query, key, value, bias, return_lse=True, kernel=name)
        want, want_lse = reference_attention(query, key, value, bias)
        torch.testing.assert_close(out.double(), want, **CLOSE)
        torch.testing.assert_close(lse.double(), want_lse, **CLOSE)
        assert (out[0] == 0).all()


def test_what_is_read_of_a_pair_is_kept(pairs):
    each = pairs["mine/everything"]
    from attn_xformers.kernels.operators import Pair

    pair = Pair(each.forward, each.backward, each.manners)
    assert read.capabilities(pair) is read.capabilities(pair)
