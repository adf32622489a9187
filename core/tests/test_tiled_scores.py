"""torch/tiled with scores: what is added by rule, tile by tile, with the gradients to what the rules hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from attn_core import (
    ALiBi,
    Causal,
    Mask,
    Neighborhood,
    Problem,
    RelPosTable,
    Score,
    Segments,
    TensorBias,
    Window,
    attention,
    explain,
)
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import build
from attn_core.torch_kernels.tiling import dense, limited, runs, scores, strips
from attn_core.torch_kernels.tiling.tables import TABLES
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "torch/tiled"
ENTRIES, HEADS = 2, 4


def normal(*shape, seed=0, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


@dataclass(frozen=True, eq=False)
class Bumps(Score):
    """A rule of one's own: not of the distance, other for each batch entry and head, by what two tensors hold."""

    by_query: torch.Tensor  # [batch, heads, 7]
    by_key: torch.Tensor  # [5]
    lengths: tuple[int, int] | None = None

    @property
    def batch_and_heads(self):
        return self.by_query.shape[0], self.by_query.shape[1]

    def added(self, b, h, q, k, dtype):
        return self.by_query[b, h, q % 7].to(dtype) * self.by_key[k % 5].to(dtype)


@dataclass(frozen=True, eq=False)
class ByKey(Score):
    """Of the key alone, and of no tensor: of fewer dimensions than the logits."""

    lengths: tuple[int, int] | None = None

    def added(self, b, h, q, k, dtype):
        return (k % 3).to(dtype)


@dataclass(frozen=True)
class Rule(Mask):
    """A mask that only `keep` knows, with rows that see nothing."""

    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return ((7 * q + 3 * k) % 5 == 0) & (q % 11 != 3)


def bumps():
    return Bumps(normal(ENTRIES, HEADS, 7, seed=1), normal(5, seed=2))


def slopes(*shape):
    return normal(*shape, seed=3).detach().abs().requires_grad_()


#: name -> (bias, seqlen_q, seqlen_kv)
KINDS = {
    "alibi": (ALiBi(HEADS), 67, 67),
    "alibi-longer-queries": (ALiBi(HEADS, corner="top-left"), 70, 33),
    "alibi-longer-keys": (ALiBi(HEADS, slopes(HEADS), corner="bottom-right"), 33, 70),
    "alibi-of-each-entry": (ALiBi(HEADS, slopes(ENTRIES, HEADS)), 41, 41),
    "alibi-causal": (Causal() + ALiBi(HEADS, slopes(HEADS)), 301, 301),
    "alibi-causal-of-each-entry": (Causal() + ALiBi(HEADS, slopes(ENTRIES, HEADS)), 301, 301),
    "alibi-causal-bottom-right": (Causal("bottom-right") + ALiBi(HEADS, corner="bottom-right"), 150, 299),
    "alibi-causal-empty-rows": (Causal("bottom-right") + ALiBi(HEADS, corner="top-left"), 299, 150),
    "alibi-window": (Window(20, 5) + ALiBi(HEADS, slopes(HEADS)), 333, 333),
    "alibi-wide-window": (Window(200, None) + ALiBi(HEADS, slopes(HEADS)), 700, 700),
    "alibi-documents": (
        Segments([3, 0, 17, 5, 5, 5, 130, 30], within=Causal()) + ALiBi(HEADS, slopes(HEADS)),
        195,
        195,
    ),
    "alibi-whole-documents": (Segments([60, 60, 60]) + ALiBi(HEADS), 180, 180),
    "alibi-line-dilated": (Neighborhood(90, kernel_size=7, dilation=3) + ALiBi(HEADS, slopes(HEADS)), 90, 90),
    "alibi-plane": (Neighborhood((20, 17), kernel_size=5) + ALiBi(HEADS, slopes(HEADS)), 340, 340),
    "alibi-causal-long-documents": (Segments([300, 300, 40], within=Causal()) + ALiBi(HEADS, slopes(HEADS)), 640, 640),
    "alibi-rule": (Rule() + ALiBi(HEADS, slopes(HEADS), "bottom-right"), 130, 90),
    "table": (RelPosTable(normal(HEADS, 9), 70), 70, 70),
    "table-wider-than-the-line": (RelPosTable(normal(HEADS, 201), 70), 70, 70),
    "table-dilated": (RelPosTable(normal(HEADS, 9), 70, dilation=3), 70, 70),
    "table-window": (Window(9, 9) + RelPosTable(normal(HEADS, 19), 300), 300, 300),
    "table-causal-on-a-plane": (Causal() + RelPosTable(normal(HEADS, 5, 7), (9, 14)), 126, 126),
    "table-plane": (Neighborhood((20, 27), kernel_size=5) + RelPosTable(normal(HEADS, 9, 9), (20, 27)), 540, 540),
    "table-plane-dilated": (
        Neighborhood((20, 27), kernel_size=(5, 4), dilation=(3, 2))
        + RelPosTable(normal(HEADS, 9, 7), (20, 27), (3, 2)),
        540,
        540,
    ),
    "table-other-plane": (Neighborhood((20, 27), kernel_size=5) + RelPosTable(normal(HEADS, 9, 9), (27, 20)), 540, 540),
    "table-space": (Neighborhood((5, 6, 7), kernel_size=3) + RelPosTable(normal(HEADS, 5, 5, 5), (5, 6, 7)), 210, 210),
    "own": (bumps(), 50, 61),
    "own-causal": (Causal("top-left") + bumps(), 301, 270),
    "own-window": (Window(9, 3) + bumps(), 150, 150),
    "own-plane": (Neighborhood((20, 17), kernel_size=5) + bumps(), 340, 340),
    "own-of-the-key": (Window(9, 3) + ByKey(), 90, 90),
    "three": (Causal() + ALiBi(HEADS, slopes(HEADS)) + bumps() + RelPosTable(normal(HEADS, 9), 90), 90, 90),
    "two-without-a-mask": (ALiBi(HEADS, slopes(HEADS)) + ByKey(), 40, 40),
}


def problem_of(bias, seqlen_q, seqlen_kv, **changes):
    bound = bias.bind(seqlen_q, seqlen_kv).normalize()
    problem = Problem(
        batch=ENTRIES,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=8,
        head_dim_v=8,
        dtype=torch.float32,
        device="cpu",
        bias=bound.without_data(),
        scale=0.4,
        return_lse=True,
        requires_grad=True,
        bias_requires_grad=bound.requires_grad,
    )
    return replace(problem, **changes), bound


def check(bias, seqlen_q, seqlen_kv, layout="contiguous", **changes):
    problem, bound = problem_of(bias, seqlen_q, seqlen_kv, **changes)
    inputs = build(problem, seed=1, bias=bound, layout=layout)
    (results,) = differences(problem, inputs, by_kernel(NAME))
    names = [result.name for result in results]
    assert names[:5] == ["out", "lse", "dq", "dk", "dv"]
    held = [tensor for tensor in bound.held().values() if tensor.requires_grad]
    assert len(names) == 5 + (len(held) if problem.bias_requires_grad else 0)
    assert all(results), "\n".join(map(str, results))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_lies_within_the_budget(name):
    check(*KINDS[name])


ONE_OF_EACH = {
    name: KINDS[name]
    for name in ("alibi-causal-of-each-entry", "alibi-window", "table-plane", "own-causal", "alibi-plane", "three")
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tensors_that_need_no_gradient(name):
    bias, *lengths = ONE_OF_EACH[name]
    bias = bias.with_held({key: tensor.detach() for key, tensor in bias.held().items()})
    check(bias, *lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_dtype_lies_within_the_budget(name, dtype):
    check(*ONE_OF_EACH[name], dtype=dtype)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 4}, {"num_kv_heads": 1}, {"layout": "heads-first"}], ids=str)
@pytest.mark.parametrize("name", ["alibi-causal-of-each-entry", "table-plane"])
def test_any_number_of_key_heads_and_any_layout(name, changes):
    check(*ONE_OF_EACH[name], **changes)


@pytest.mark.parametrize("scale", [0.0, -0.5], ids=["zero", "negative"])
@pytest.mark.parametrize("name", ["alibi-window", "own-causal"])
def test_a_scale_of_zero_or_below_is_that_of_the_logits_alone(name, scale):
    check(*ONE_OF_EACH[name], scale=scale)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_chunks_of_a_single_tile_of_a_single_head_give_the_same(name, monkeypatch):
    TABLES.clear()
    for module, bound in (
        (runs, "FORWARD_BYTES"),
        (runs, "BACKWARD_BYTES"),
        (strips, "STRIPS_BYTES"),
        (limited, "ELEMENTS"),
        (scores, "SHARED_BYTES"),
    ):
        monkeypatch.setattr(module, bound, 1)
    check(*ONE_OF_EACH[name])
    TABLES.clear()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_matrix_products_serve_a_device_without_a_fused_kernel(name, monkeypatch):
    monkeypatch.setattr(dense, "forward", dense.plain_forward)
    monkeypatch.setattr(dense, "backward", dense.plain_backward)
    check(*ONE_OF_EACH[name])


BESIDE = {
    "no-mask": (ALiBi(HEADS, slopes(HEADS)), 67, 67),
    "of-each-entry": (ALiBi(HEADS, slopes(ENTRIES, HEADS)), 41, 41),
    "longer-queries": (ALiBi(HEADS, slopes(HEADS), "top-left"), 70, 33),
    "longer-queries-bottom-right": (ALiBi(HEADS, corner="bottom-right"), 70, 33),
    "longer-keys": (ALiBi(HEADS, slopes(HEADS), "top-left"), 33, 70),
    "longer-keys-bottom-right": (ALiBi(HEADS, slopes(HEADS), "bottom-right"), 33, 70),
    "two": (ALiBi(HEADS) + ALiBi(HEADS, slopes(HEADS)), 50, 50),
    "causal": (Causal() + ALiBi(HEADS, slopes(ENTRIES, HEADS)), 61, 61),
    "causal-longer-keys": (Causal("bottom-right") + ALiBi(HEADS, slopes(HEADS), "bottom-right"), 41, 70),
    "causal-longer-queries": (Causal("top-left") + ALiBi(HEADS, slopes(HEADS), "top-left"), 70, 41),
    "causal-another-corner": (Causal("bottom-right") + ALiBi(HEADS, slopes(HEADS), "top-left"), 41, 70),
    "documents": (Segments([20, 20, 20, 7, 0, 3], within=Causal()) + ALiBi(HEADS, slopes(HEADS)), 70, 70),
    "whole-documents": (Segments([20, 20, 20, 9]) + ALiBi(HEADS, slopes(HEADS)), 69, 69),
}


@pytest.mark.parametrize("grad", [True, False], ids=["slopes-with-gradient", "slopes-without"])
@pytest.mark.parametrize("name", BESIDE)
def test_tiles_on_either_side_of_the_diagonal_are_joined(name, grad, monkeypatch):
    TABLES.clear()
    monkeypatch.setattr(limited, "MOST", 8)
    monkeypatch.setattr(limited, "FEWEST", 8)
    bias, *lengths = BESIDE[name]
    if not grad:
        bias = bias.with_held({key: tensor.detach() for key, tensor in bias.held().items()})
    check(bias, *lengths)
    TABLES.clear()


@pytest.mark.parametrize("mask", [None, Causal()], ids=["no-mask", "causal"])
def test_beside_the_diagonal_of_alibi_no_block_is_made(mask):
    query, key, value = (normal(1, 2048, 1, 8, seed=seed, grad=False) for seed in range(3))
    bias = ALiBi(1) if mask is None else mask + ALiBi(1)
    TABLES.clear()
    with LargestResult() as probe:
        attention(query, key, value, bias, kernel=NAME)
    assert 0 < probe.elements <= 2 * limited.MOST**2


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that an op made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return result


LONG = {
    "alibi": ALiBi(2, slopes(2)),
    "alibi-causal": Causal() + ALiBi(2),
    "alibi-window": Window(100, 0) + ALiBi(2, slopes(2)),
    "own-causal": Causal() + Bumps(normal(1, 2, 7), normal(5)),
    "table-plane": Neighborhood((64, 64), kernel_size=9) + RelPosTable(normal(2, 17, 17), (64, 64)),
    "alibi-documents": Segments([64] * 32 + [2048], within=Causal()) + ALiBi(2),
}


@pytest.mark.parametrize("name", LONG)
def test_nothing_of_the_size_of_all_pairs_is_ever_made(name):
    bias, allowed = LONG[name], 4096 * 4096 // 2
    TABLES.clear()
    query, key, value = (normal(1, 4096, 2, 8, seed=seed) for seed in range(3))
    with LargestResult() as probe:
        attention(query, key, value, bias, kernel=NAME).sum().backward()
    assert 0 < probe.elements < allowed
    with LargestResult() as probe:
        bias.bind(4096, 4096).materialize()
    assert probe.elements > allowed  # what would have been seen


def test_two_runs_are_bit_equal_in_the_gradients_to_tables_too():
    for name in ("alibi-causal-of-each-entry", "table-plane", "own-causal"):
        problem, bound = problem_of(*KINDS[name], return_lse=False)
        inputs = build(problem, seed=5, bias=bound)

        def results(inputs=inputs):
            out = by_kernel(NAME)(inputs)
            wanted = inputs.query, inputs.key, inputs.value, *inputs.bias.held().values()
            return out, *torch.autograd.grad(out, wanted, inputs.grad_out)

        assert all(torch.equal(one, two) for one, two in zip(results(), results()))


@pytest.mark.parametrize("dims", [(0, None), (0, 0)], ids=["one-table-for-all", "a-table-for-each-sample"])
def test_func_grad_and_vmap_give_what_the_reference_does(dims):
    x = normal(3, 2, 40, HEADS, 8, grad=False).double()
    table = normal(*([3] if dims[1] == 0 else []), HEADS, 19, grad=False).double()

    def loss(name):
        def of(x, table):
            bias = Window(4, 2) + RelPosTable(table, 40)
            return attention(x, x, x, bias, kernel=name).square().sum()

        return torch.func.vmap(torch.func.grad(of, argnums=(0, 1)), in_dims=dims)

    for got, want in zip(loss(NAME)(x, table), loss("torch/reference")(x, table)):
        torch.testing.assert_close(got, want)


def test_samples_of_scores_without_tensors_are_folded_into_the_batch():
    x = normal(3, 2, 40, HEADS, 8, grad=False).double()

    def of(name):
        return torch.func.vmap(lambda x: attention(x, x, x, Window(4, 2) + ALiBi(HEADS), kernel=name))

    torch.testing.assert_close(of(NAME)(x), of("torch/reference")(x))


def test_in_a_graph_a_rule_of_ones_own_is_taken():
    x = normal(1, 64, HEADS, 8, grad=False)

    def called(x):
        return attention(x, x, x, Window(4, 2) + ByKey(), kernel=NAME)

    torch.testing.assert_close(torch.compile(called, fullgraph=True, backend="eager")(x), called(x))


def test_a_tensor_is_left_to_the_dense_kernels():
    x = normal(1, 64, HEADS, 8, grad=False)
    table = explain(x, x, x, Window(4, 2) + TensorBias(torch.zeros(64, 64)))
    assert "TensorBias" in str(table[NAME])
