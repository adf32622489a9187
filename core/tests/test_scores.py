"""Biases that add numbers, by brute force: what each means is written here a second time, as a loop."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from attn_core import (
    ALiBi,
    AttnBias,
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    Neighborhood,
    RelPosTable,
    Score,
    Sum,
    TensorBias,
    UnboundBiasError,
    Window,
    attention,
    explain,
    reference_attention,
)
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import Inputs

SEED = 20261121
KERNELS = ("torch/flash", "torch/math", "torch/reference", "torch/flex")


def normal(*shape: int, seed: int = SEED, **options: object) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)  # type: ignore[call-overload]


def matrix(bias, seqlen_q, seqlen_kv):
    """The dense form, full size."""
    batch, heads = bias.batch_and_heads
    return bias.bind(seqlen_q, seqlen_kv).materialize().expand(batch, heads, seqlen_q, seqlen_kv)


# What each adds


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [-8]),
        (2, [-4, -8]),
        (8, [-1, -2, -3, -4, -5, -6, -7, -8]),
        (3, [-4, -8, -2]),
        (6, [-2, -4, -6, -8, -1, -3]),
        (12, [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]),
    ],
    ids=str,
)
def test_the_slopes_of_alibi_are_those_of_the_paper(heads, exponents):
    slopes = -matrix(ALiBi(heads), 2, 2)[0, :, 1, 0]
    assert slopes.tolist() == pytest.approx([2.0**exponent for exponent in exponents], rel=1e-6)


@pytest.mark.parametrize("corner", ["top-left", "bottom-right"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), list(itertools.product(range(1, 5), range(1, 5))))
def test_alibi_takes_off_the_slope_for_each_key_from_the_diagonal(corner, seqlen_q, seqlen_kv):
    slopes = torch.tensor([[0.5, 0.25], [2.0, 0.0]])
    got = matrix(ALiBi(2, slopes, corner), seqlen_q, seqlen_kv)
    shift = seqlen_kv - seqlen_q if corner == "bottom-right" else 0
    for b, h, i, j in itertools.product(range(2), range(2), range(seqlen_q), range(seqlen_kv)):
        assert got[b, h, i, j] == -slopes[b, h] * abs(j - (i + shift))


def offsets_of(extents, dilation):
    """For each query and key of a grid: the entry's place on every axis, from the middle; None between entries."""
    grid = list(itertools.product(*map(range, extents)))
    for (i, q), (j, k) in itertools.product(enumerate(grid), enumerate(grid)):
        steps = [(b - a, step) for a, b, step in zip(q, k, dilation)]
        on_entries = all(distance % step == 0 for distance, step in steps)
        yield i, j, tuple(distance // step for distance, step in steps) if on_entries else None


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("reach", [1, 2, 3, 5])
@pytest.mark.parametrize("extents", [(4,), (1,), (3, 4), (2, 2, 3)], ids=str)
def test_a_table_adds_the_entry_of_the_offset_and_nothing_beyond_it(extents, reach, dilation):
    rank = len(extents)
    table = normal(2, *(2 * reach - 1,) * rank)
    size = math.prod(extents)
    got = matrix(RelPosTable(table, extents, dilation), size, size)
    for i, j, offset in offsets_of(extents, (dilation,) * rank):
        inside = offset is not None and all(abs(n) < reach for n in offset)
        want = table[(slice(None), *(n + reach - 1 for n in offset))] if inside else torch.zeros(2)
        assert torch.equal(got[0, :, i, j], want), (i, j, offset)


def test_swins_table_is_turned_around():
    height, width, heads = 3, 2, 2
    table = normal((2 * height - 1) * (2 * width - 1), heads)
    got = matrix(RelPosTable.from_swin(table, (height, width)), 6, 6)
    grid = list(itertools.product(range(height), range(width)))
    for (i, (qy, qx)), (j, (ky, kx)) in itertools.product(enumerate(grid), enumerate(grid)):
        index = (qy - ky + height - 1) * (2 * width - 1) + (qx - kx + width - 1)  # as Swin's relative_position_index
        assert torch.equal(got[0, :, i, j], table[index])


# Sums


def test_a_sum_adds_what_is_added_and_masks_what_is_masked():
    tensor, padding = normal(2, 1, 5, 5), KeyPadding([3, 5])
    bias = Causal() + TensorBias(tensor) + ALiBi(4) + padding
    assert isinstance(bias, Sum)
    got = matrix(bias, 5, 5)
    alibi = matrix(ALiBi(4), 5, 5)
    for b, h, i, j in itertools.product(range(2), range(4), range(5), range(5)):
        kept = j <= i and j < (3, 5)[b]
        want = tensor[b, 0, i, j] + alibi[0, h, i, j] if kept else -math.inf
        assert got[b, h, i, j] == want


def test_plus_flattens_and_joins_the_masks_behind_the_rest():
    bias = (Causal() + ALiBi(2)) + (TensorBias(torch.zeros(3, 3)) + Window(1, 1))
    assert [type(part).__name__ for part in bias.parts] == ["ALiBi", "TensorBias", "Intersection"]
    assert bias.mask == Causal() & Window(1, 1)
    assert [type(part) for part in bias.scores] == [ALiBi, TensorBias]


def test_the_sum_of_two_masks_is_their_intersection():
    assert Causal() + Window(1, 1) == Causal() & Window(1, 1)


def test_a_tensor_may_be_added_from_either_side():
    tensor = normal(3, 3)
    for bias in (ALiBi(2) + tensor, ALiBi(2) + TensorBias(tensor)):
        assert torch.equal(matrix(bias, 3, 3), matrix(ALiBi(2), 3, 3) + tensor)


@pytest.mark.parametrize(
    ("bias", "kinds"),
    [
        (Window(None, 0) + ALiBi(2), [ALiBi, Causal]),
        (Window(9, 9) + ALiBi(2), None),
        (Neighborhood(4, kernel_size=4) + ALiBi(2) + torch.zeros(4, 4), [ALiBi, TensorBias]),
    ],
    ids=["simpler mask", "no mask left", "sum left"],
)
def test_normalize_simplifies_the_mask_and_keeps_the_dense_form(bias, kinds):
    bound = bias.bind(4, 4)
    simple = bound.normalize()
    assert [type(part) for part in simple.parts] == kinds if kinds else type(simple) is ALiBi
    assert torch.equal(bound.materialize(), simple.materialize().expand_as(bound.materialize()))


# As values


def some_biases():
    yield ALiBi(2)
    yield ALiBi(2, normal(2), "top-left")
    yield ALiBi(2, normal(3, 2))
    yield RelPosTable(normal(2, 5), 3)
    yield RelPosTable(normal(2, 3, 3), (2, 2), 2)
    yield Causal() + ALiBi(2, normal(2))
    yield KeyPadding([1, 2]) + TensorBias(normal(4, 4))


each_bias = pytest.mark.parametrize("make", range(len(list(some_biases()))), ids=[str(b) for b in some_biases()])


@each_bias
def test_equal_values_are_equal_and_survive_copies(make):
    one, other = list(some_biases())[make], list(some_biases())[make]
    for copied in (other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied == one
        assert hash(copied) == hash(one)
    assert one != Causal()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ALiBi(2), ALiBi(4)),
        (ALiBi(2, normal(2)), ALiBi(2, normal(2, seed=1))),
        (ALiBi(2, normal(2)), ALiBi(2)),
        (RelPosTable(normal(1, 3), 3), RelPosTable(normal(1, 3), 3, 2)),
        (Causal() + ALiBi(2), Window(1, 0) + ALiBi(2)),
    ],
    ids=["heads", "numbers", "none", "dilation", "mask"],
)
def test_different_values_differ(one, other):
    assert one != other


def test_to_moves_every_tensor_and_casts_the_floating_ones():
    bias = (KeyPadding([1, 2]) + ALiBi(2, normal(2))).to("meta", torch.float64)
    assert [(tensor.dtype, tensor.device.type) for tensor in bias.held().values()] == [
        (torch.float64, "meta"),
        (torch.int64, "meta"),
    ]


# On kernels


def inputs_of(bias, seqlen, heads, requires_grad, dtype=torch.float32, batch=2, lse=True):
    def tensor(seed):
        return normal(batch, seqlen, heads, 16, seed=seed).to(dtype).requires_grad_(requires_grad)

    query, key, value = tensor(1), tensor(2), tensor(3)
    options = {"scale": 0.25, "return_lse": True} if lse else {"scale": 0.25}
    grad_lse = normal(batch, heads, seqlen, seed=5) if lse else None
    grad_out = normal(batch, seqlen, heads, 16, seed=4).to(dtype)
    return Inputs(query=query, key=key, value=value, bias=bias, grad_out=grad_out, grad_lse=grad_lse, options=options)


def trainable():
    yield ALiBi(4, normal(4).abs().requires_grad_())
    yield ALiBi(4, normal(2, 4).abs().requires_grad_()) + Causal()
    yield RelPosTable(normal(4, 5, 5).requires_grad_(), (3, 4)) + Neighborhood((3, 4), kernel_size=3)
    yield RelPosTable(normal(4, 23).requires_grad_(), 12)
    yield TensorBias(normal(1, 4, 12, 12).requires_grad_()) + ALiBi(4, normal(4).requires_grad_()) + KeyPadding([7, 12])


each_trainable = pytest.mark.parametrize("make", range(5), ids=[str(b) for b in trainable()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@each_trainable
def test_every_kernel_agrees_with_the_reference_and_trains_the_bias(make, kernel, dtype):
    bias = list(trainable())[make]
    gradients = kernel in ("torch/math", "torch/reference")
    if not gradients:
        held = {name: tensor.detach() for name, tensor in bias.held().items()}
        bias = bias.with_held(held)
    lse = kernel != "torch/math"
    inputs = inputs_of(bias, 12, 4, kernel not in ("torch/flex",), dtype, lse=lse)
    problem = explain(inputs.query, inputs.key, inputs.value, inputs.bias, **inputs.options).problem
    (results,) = differences(problem, inputs, by_kernel(kernel))
    wrong = [str(result) for result in results if not result]
    assert not wrong, "\n".join(wrong)
    if gradients:
        assert sum(result.name.startswith("dbias") for result in results) == sum(
            tensor.requires_grad for tensor in bias.held().values()
        )


def test_a_kernel_without_a_gradient_to_the_bias_refuses_a_trained_table():
    table = normal(4, 23).requires_grad_()
    inputs = inputs_of(RelPosTable(table, 12), 12, 4, True)
    told = explain(inputs.query, inputs.key, inputs.value, inputs.bias)
    assert told["torch/flash"].refused_fields == ("bias_grad",)
    assert told.chosen == "torch/math"


def test_a_long_distance_is_exact_beside_half_precision_operands():
    seqlen = 700  # bfloat16 has no 257
    query, key, value = (normal(1, seqlen, 2, 8, seed=n).to(torch.bfloat16) for n in (1, 2, 3))
    slopes = torch.tensor([1.0, 0.01])
    got = attention(query * 0, key, value, ALiBi(2, slopes))
    want, _ = reference_attention(query * 0, key, value, ALiBi(2, slopes))
    assert torch.allclose(got.double(), want, atol=2e-2)


def test_new_slopes_of_the_same_shape_are_seen_though_the_choice_is_kept():
    query, key, value = (normal(1, 9, 2, 8, seed=n) for n in (1, 2, 3))
    for seed in range(3):
        bias = ALiBi(2, normal(2, seed=seed))
        want, _ = reference_attention(query, key, value, bias)
        assert torch.allclose(attention(query, key, value, bias).double(), want, atol=1e-5)


def test_a_strangers_score_needs_its_fields_and_its_rule():
    @dataclass(frozen=True)
    class Parity(Score):
        """The further of two kinds of keys counts less."""

        penalty: float
        lengths: tuple[int, int] | None = None

        def added(self, b, h, q, k, dtype):
            return -self.penalty * (k % 2).to(dtype)

    query, key, value = (normal(1, 9, 2, 8, seed=n) for n in (1, 2, 3))
    for bias in (Parity(0.5), Parity(0.5) + Causal()):
        want, _ = reference_attention(query, key, value, bias)
        for kernel in KERNELS:
            got = attention(query, key, value, bias, kernel=kernel)
            assert torch.allclose(got.double(), want, atol=1e-5), kernel
    dense = Parity(0.5).bind(9, 9).materialize()
    assert dense.flatten().tolist() == [0.0, -0.5] * 4 + [0.0]


def test_softcap_comes_before_what_is_added():
    query, key, value = (4 * normal(1, 6, 2, 8, seed=n) for n in (1, 2, 3))
    bias = ALiBi(2, torch.tensor([3.0, 0.1]))
    want, _ = reference_attention(query, key, value, bias, softcap=2.0)
    by_hand = 2.0 * torch.tanh((query.transpose(1, 2) @ key.transpose(1, 2).mT) * 8**-0.5 / 2.0)
    by_hand = torch.softmax(by_hand + matrix(bias, 6, 6), -1) @ value.transpose(1, 2)
    assert torch.allclose(want, by_hand.transpose(1, 2).double(), atol=1e-5)
    assert torch.allclose(
        attention(query, key, value, bias, softcap=2.0, kernel="torch/flex").double(), want, atol=1e-5
    )


# Compiled


@pytest.mark.parametrize("given", ["as an argument", "built inside"])
@each_trainable
def test_a_graph_takes_it_whole_and_gives_the_gradient(make, given):
    torch._dynamo.reset()
    bias = list(trainable())[make]
    tensors = {name: x for name, x in bias.held().items() if x.requires_grad}
    inputs = inputs_of(bias, 12, 4, True)

    def run(query, key, value, bias, tensors):
        if given == "built inside":
            bias = bias.with_held(tensors)
        return attention(query, key, value, bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    operands = inputs.query, inputs.key, inputs.value
    for function in (run, compiled):
        out = function(*operands, bias, tensors)
        gradients = torch.autograd.grad(out, [*operands, *tensors.values()], inputs.grad_out)
        if function is run:
            wanted, wanted_gradients = out, gradients
    assert torch.allclose(out, wanted, atol=1e-5)
    for got, want in zip(gradients, wanted_gradients):
        assert torch.allclose(got, want, atol=1e-4)


def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, Causal() + ALiBi(2)), fullgraph=True, dynamic=True, backend=counting
    )
    for seqlen in (16, 24, 40, 33):
        query, key, value = (normal(1, seqlen, 2, 8, seed=n) for n in (1, 2, 3))
        want, _ = reference_attention(query, key, value, Causal() + ALiBi(2))
        assert torch.allclose(compiled(query, key, value).double(), want, atol=1e-5)
    assert len(graphs) == 1


# Refused


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ALiBi(0), InputError, "num_heads must be an int >= 1, got 0"),
        (lambda: ALiBi("8"), InputError, "num_heads must be an int >= 1, got '8'"),
        (lambda: ALiBi(None), InputError, "num_heads must be an int >= 1, got None"),
        (lambda: ALiBi(torch.tensor(2)), InputError, r"num_heads must be an int >= 1, got tensor\(2\)"),
        (lambda: ALiBi(2, [0.5, 0.25]), InputTypeError, "must be a floating tensor, got list"),
        (
            lambda: ALiBi(2, torch.ones(2, dtype=torch.int64)),
            InputTypeError,
            "must be a floating tensor, got torch.int64",
        ),
        (lambda: ALiBi(2, torch.ones(3)), InputError, r"\[num_heads=2\] or \[batch, 2\], got shape \[3\]"),
        (lambda: ALiBi(2, corner="left"), InputError, "corner must be"),
        (lambda: ALiBi(2).bind(3, 5), InputError, "has no corner"),
        (lambda: ALiBi(2).materialize(), UnboundBiasError, "does not know its lengths"),
        (lambda: RelPosTable(torch.ones(2, 4), 3), InputError, "must be odd, got 4 on axis 0"),
        (lambda: RelPosTable(torch.ones(2, 3), (3, 3)), InputError, "2 axes, so table must be"),
        (lambda: RelPosTable(torch.ones(2, 3, 3), (3, 0)), InputError, "extents must be an int >= 1, got 0 on axis 1"),
        (lambda: RelPosTable(torch.ones(2, 3), 3, 0), InputError, "dilation must be an int >= 1, got 0 on axis 0"),
        (lambda: RelPosTable(torch.ones(2, 3, dtype=torch.int8), 3), InputTypeError, "got torch.int8"),
        (lambda: RelPosTable(torch.ones(2, 3), 3).bind(4, 4), InputError, "3 tokens, which must be both lengths"),
        (lambda: RelPosTable.from_swin(torch.ones(8, 2), (2, 2)), InputError, "2 x 2 has 9 entries"),
        (lambda: RelPosTable.from_swin(torch.ones(9, 2), 2), InputError, r"window must be \(height, width\), .* got 2"),
        (lambda: RelPosTable.from_swin([[1.0]], (1, 1)), InputTypeError, "from_swin: table must be .* got list"),
        (lambda: ALiBi(2) & Causal(), InputTypeError, "only masks intersect"),
        (lambda: Causal() & ALiBi(2), InputTypeError, "only masks intersect"),
        (lambda: ALiBi(2) + "x", InputTypeError, "takes None"),
        (lambda: ALiBi(2) + ALiBi(4), InputError, "num_heads=2 and 4"),
        (lambda: ALiBi(2).bind(3, 3) + Causal().bind(4, 4), InputError, "was made for other lengths than"),
        (lambda: ALiBi(2, torch.ones(2)) + ALiBi(2, torch.ones(2, device="meta")), InputError, "lie on cpu and meta"),
        (lambda: Sum((Causal(), ALiBi(2))), InputTypeError, "one mask, as the last part"),
        (lambda: Sum((ALiBi(2),)), InputError, "takes two or more, got 1"),
    ],
)
def test_what_does_not_fit_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (ALiBi(4), "was made for num_heads=4, got num_heads=2"),
        (ALiBi(2, torch.ones(3, 2)), "was made for batch=3, got batch=1"),
        (ALiBi(2, torch.ones(2, device="meta")), "must be on query's device cpu, got meta"),
        (RelPosTable(torch.ones(2, 3), 5), "5 tokens, which must be both lengths"),
    ],
    ids=["heads", "batch", "device", "lengths"],
)
def test_a_call_that_does_not_fit_the_bias_is_refused(bias, text):
    query = torch.ones(1, 4, 2, 8)
    with pytest.raises(InputError, match=text):
        attention(query, query, query, bias)


def test_a_bias_says_which_of_its_parts_is_a_mask():
    bias: AttnBias = Causal() + ALiBi(2)
    assert bias.mask == Causal()
    assert bias.scores == (ALiBi(2),)
    assert (Causal().mask, Causal().scores) == (Causal(), ())
    assert (ALiBi(2).mask, ALiBi(2).scores) == (None, (ALiBi(2),))
