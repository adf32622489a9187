"""torch/tiled: every kind of mask by the error budget, whatever the lengths, layouts and chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from attn_core import Causal, Mask, Neighborhood, Problem, Segments, Window, attention, explain, kernel
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import build
from attn_core.torch_kernels.tiling import blocks, boxes, dense, function, runs, strips
from attn_core.torch_kernels.tiling.intervals import stretches, widened
from attn_core.torch_kernels.tiling.tables import TABLES
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "torch/tiled"


@dataclass(frozen=True)
class Rule(Mask):
    """Some rule that only `keep` knows, other for each batch entry and head where it says so; empty rows too."""

    entries: int = 1
    heads: int = 1
    lengths: tuple[int, int] | None = None

    @property
    def batch_and_heads(self):
        return self.entries, self.heads

    def keep(self, b, h, q, k):
        seen = ((7 * q + 3 * k + h * (self.heads > 1) + 2 * b * (self.entries > 1)) % 5 == 0) | ((k < 10) & (q > 20))
        return seen & (q % 11 != 3)


@dataclass(frozen=True)
class Prefix(Mask):
    """Causal, but for the first keys, which all see: with full and with empty tiles."""

    first: int
    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return (k < self.first) | (k <= q)

    def span(self, q0, q1):
        return 0, min(max(self.first, q1), self.bound_lengths()[1])

    def tile(self, q0, q1, k0, k1):
        if k1 <= max(self.first, q0 + 1):
            return "full"
        return "empty" if k0 >= max(self.first, q1) else "mixed"


@dataclass(frozen=True)
class Table(Mask):
    """Looked up in a tensor that the mask holds."""

    table: torch.Tensor
    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return self.table.to(q.device)[q % 7, k % 5]


LENGTHS = [3, 0, 17, 5, 5, 5, 40, 1, 130, 30, 30]
TOTAL = sum(LENGTHS)
OTHER = [5, 3, 17, 5, 5, 5, 2, 1, 100, 30, 30]
TABLE = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
GAPS = Segments([5, 5, 9], [7, 7, 2], starts_kv=[1, 9, 20], within=Causal("bottom-right"))

BANDS = {
    "causal": Causal("top-left"),
    "causal-bottom-right": Causal("bottom-right"),
    "window": Window(16, 16, "top-left"),
    "window-one-side": Window(3, 0, "bottom-right"),
    "window-of-one": Window(0, 0, "top-left"),
    "no-limit-left": Window(None, 5, "bottom-right"),
    "no-limit-right": Window(7, None, "top-left"),
    "intersection": Causal("bottom-right") & Window(9, 9, "top-left"),
}
#: name -> (mask, seqlen_q, seqlen_kv)
OTHERS = {
    "line": (Neighborhood(37, kernel_size=5), 37, 37),
    "line-dilated": (Neighborhood(37, kernel_size=6, dilation=3), 37, 37),
    "line-strided": (Neighborhood(300, kernel_size=20, stride=7), 300, 300),
    "line-causal": (Neighborhood(50, kernel_size=7, is_causal=True, dilation=2), 50, 50),
    "plane": (Neighborhood((20, 27), kernel_size=(7, 5)), 540, 540),
    "plane-even-strided": (Neighborhood((20, 27), kernel_size=(6, 4), stride=(2, 3)), 540, 540),
    "plane-dilated": (Neighborhood((20, 27), kernel_size=(5, 4), dilation=(3, 2)), 540, 540),
    "plane-causal-on-one-axis": (Neighborhood((20, 27), kernel_size=7, is_causal=(True, False)), 540, 540),
    "plane-whole-axis": (Neighborhood((20, 27), kernel_size=(20, 4)), 540, 540),
    "plane-of-windows": (Neighborhood((16, 16), kernel_size=8, stride=8), 256, 256),
    "space": (Neighborhood((6, 7, 9), kernel_size=3), 378, 378),
    "space-all-at-once": (
        Neighborhood(
            (6, 7, 9), kernel_size=(3, 4, 2), stride=(2, 1, 2), dilation=(2, 1, 3), is_causal=(False, True, True)
        ),
        378,
        378,
    ),
    "documents": (Segments(LENGTHS), TOTAL, TOTAL),
    "documents-causal": (Segments(LENGTHS, within=Causal()), TOTAL, TOTAL),
    "documents-window": (Segments(LENGTHS, within=Window(4, 2)), TOTAL, TOTAL),
    "documents-unequal": (Segments(LENGTHS, OTHER, within=Causal("bottom-right")), TOTAL, sum(OTHER)),
    "documents-gaps": (GAPS, 19, 25),
    "documents-and-window": (Segments(LENGTHS) & Window(30, 30), TOTAL, TOTAL),
    "plane-and-causal": (Neighborhood((10, 30), kernel_size=3) & Causal(), 300, 300),
    "rule": (Rule(), 300, 280),
    "rule-per-head": (Rule(heads=4), 150, 70),
    "rule-per-entry": (Rule(entries=2), 70, 150),
    "rule-per-both": (Rule(entries=2, heads=4), 100, 100),
    "prefix": (Prefix(100), 700, 700),
    "table": (Table(TABLE), 100, 90),
}
SIZES = [(5, 5), (1, 9), (64, 64), (100, 100), (33, 70), (70, 33), (290, 600), (600, 290)]


def problem_of(mask, seqlen_q, seqlen_kv, **changes):
    bound = mask.bind(seqlen_q, seqlen_kv).normalize()
    problem = Problem(
        batch=2,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        head_dim_v=8,
        dtype=torch.float32,
        device="cpu",
        bias=None if bound is None else bound.without_data(),
        scale=0.4,
        return_lse=True,
        requires_grad=True,
    )
    return replace(problem, **changes), bound


def check(mask, seqlen_q, seqlen_kv, layout="contiguous", **changes):
    problem, bound = problem_of(mask, seqlen_q, seqlen_kv, **changes)
    if bound is None:
        pytest.skip("at these lengths it masks nothing")
    inputs = build(problem, seed=1, bias=bound, layout=layout)
    (results,) = differences(problem, inputs, by_kernel(NAME))
    wanted = ["out", *(["lse"] if problem.return_lse else []), *(["dq", "dk", "dv"] if problem.requires_grad else [])]
    assert [result.name for result in results] == wanted
    assert all(results), "\n".join(map(str, results))


@pytest.mark.parametrize("lengths", SIZES, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("name", BANDS)
def test_bands_of_any_lengths_lie_within_the_budget(name, lengths):
    check(BANDS[name], *lengths)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_kind_lies_within_the_budget(name):
    check(*OTHERS[name])


ONE_OF_EACH = {name: (BANDS[name], 150, 200) for name in ("causal-bottom-right", "window", "no-limit-left")} | {
    name: OTHERS[name] for name in ("plane", "line-dilated", "documents-causal", "rule-per-both", "prefix")
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_dtype_lies_within_the_budget(name, dtype):
    check(*ONE_OF_EACH[name], dtype=dtype)


@pytest.mark.parametrize("layout", ["heads-first", "packed"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_operands_of_any_layout_are_read_right(name, layout):
    check(*ONE_OF_EACH[name], layout=layout)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 4}, {"num_kv_heads": 1}, {"batch": 1}], ids=str)
@pytest.mark.parametrize("name", ["window", "plane", "documents-causal"])
def test_any_number_of_key_heads(name, changes):
    check(*ONE_OF_EACH[name], **changes)


@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_what_is_not_asked_for_is_not_given(grad, lse):
    check(Window(5, 5), 40, 40, return_lse=lse, requires_grad=grad)


@pytest.mark.parametrize("scale", [0.0, -0.5], ids=["zero", "negative"])
@pytest.mark.parametrize("name", ["causal-bottom-right", "window", "documents-causal"])
def test_a_scale_of_zero_or_below_is_honoured(name, scale):
    check(*ONE_OF_EACH[name], scale=scale)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "documents", "space"])
def test_chunks_of_a_single_tile_of_a_single_head_give_the_same(name, monkeypatch):
    for module, bound in ((runs, "FORWARD_BYTES"), (runs, "BACKWARD_BYTES"), (strips, "STRIPS_BYTES")):
        monkeypatch.setattr(module, bound, 1)
    check(*(ONE_OF_EACH | OTHERS)[name])


@pytest.mark.parametrize("name", ["rule", "rule-per-head", "rule-per-both", "prefix"])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_masks_that_are_made_when_they_are_needed_are_the_same(name, chunk, monkeypatch):
    TABLES.clear()
    monkeypatch.setattr(blocks, "KEPT", 0)
    monkeypatch.setattr(runs, "FORWARD_BYTES", chunk)
    monkeypatch.setattr(runs, "BACKWARD_BYTES", chunk)
    check(*OTHERS[name])
    TABLES.clear()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_matrix_products_serve_a_device_without_a_fused_kernel(name, monkeypatch):
    monkeypatch.setattr(dense, "forward", dense.plain_forward)
    monkeypatch.setattr(dense, "backward", dense.plain_backward)
    check(*ONE_OF_EACH[name])
    check(*ONE_OF_EACH[name], dtype=torch.float16)


def test_padding_between_documents_is_never_read():
    problem, bound = problem_of(GAPS, 19, 25)
    inputs = build(problem, seed=2, bias=bound)
    valid = bound.valid_keys()[0]
    want = attention(inputs.query, inputs.key, inputs.value, GAPS, kernel="torch/reference")
    with torch.no_grad():
        inputs.key[:, ~valid] = float("nan")
        inputs.value[:, ~valid] = float("inf")
    out = attention(inputs.query, inputs.key, inputs.value, GAPS, kernel=NAME)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.square().sum(), (inputs.query, inputs.key, inputs.value))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][:, ~valid].any()
    assert (~valid).sum() == 9


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
    "window": Window(100, 100).bind(4096, 4096),
    "window-one-side": Window(None, 3).bind(4096, 4096),
    "plane": Neighborhood((64, 64), kernel_size=9).bind(4096, 4096),
    "line": Neighborhood(4096, kernel_size=31, dilation=4).bind(4096, 4096),
    "documents": Segments([64] * 60 + [128, 128], within=Causal()).bind(4096, 4096),
    "intersection": (Causal() & Window(50, 50)).bind(4096, 4096),
    "prefix": Prefix(100, (4096, 4096)),
    "rule": Rule(lengths=(4096, 4096)),
}


@pytest.mark.parametrize("name", LONG)
def test_nothing_of_the_size_of_all_pairs_is_ever_made(name):
    mask, allowed = LONG[name], 4096 * 4096 // 8
    TABLES.clear()
    generator = torch.Generator().manual_seed(3)
    query, key, value, grad = (torch.randn(1, 1, 4096, 8, generator=generator) for _ in range(4))
    with LargestResult() as probe:
        out, lse = function.forward(query, key, value, mask, 0.3)
        function.backward(grad, None, query, key, value, out, lse, mask, 0.3)
    assert 0 < probe.elements < allowed
    with LargestResult() as probe:
        mask.materialize()
    assert probe.elements > allowed  # what would have been seen


def test_tables_are_kept_by_bias_and_bounded(monkeypatch):
    TABLES.clear()
    x = torch.randn(1, 256, 2, 8, generator=torch.Generator().manual_seed(4))
    for _ in range(2):
        attention(x, x, x, Window(20, 20), kernel=NAME)
    one = TABLES.nbytes
    assert one > 0
    attention(x, x, x, Window(21, 20), kernel=NAME)
    assert TABLES.nbytes > one
    monkeypatch.setattr(TABLES, "bound", 2 * one)
    for width in range(30, 60):
        attention(x, x, x, Window(width, 20), kernel=NAME)
        assert TABLES.nbytes <= 2 * one
    TABLES.clear()
    assert TABLES.nbytes == 0


def test_two_runs_are_bit_equal():
    for name in ("window", "plane", "documents-causal"):
        mask, seqlen_q, seqlen_kv = ONE_OF_EACH[name]
        problem, bound = problem_of(mask, seqlen_q, seqlen_kv, return_lse=False)
        inputs = build(problem, seed=5, bias=bound)

        def results(inputs=inputs):
            out = by_kernel(NAME)(inputs)
            operands = inputs.query, inputs.key, inputs.value
            return out, *torch.autograd.grad(out, operands, inputs.grad_out)

        assert all(torch.equal(one, two) for one, two in zip(results(), results()))


def test_the_gradient_of_a_sum_and_of_shared_operands():
    x = torch.randn(2, 90, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    got, want = (attention(x, x, x, Window(9, 3), kernel=name) for name in (NAME, "torch/reference"))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))


def test_operands_expanded_over_the_sequence_are_read_right():
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(1, size, 2, 8, dtype=torch.float64, generator=generator) for size in (50, 1))
    key = key.expand(1, 50, 2, 8)
    got, want = (attention(query, key, key, Window(9, 3), kernel=name) for name in (NAME, "torch/reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", [Window(4, 2, "top-left"), Rule(entries=2)], ids=["window", "rule-per-entry"])
def test_func_grad_and_vmap_give_what_the_reference_does(mask):
    generator = torch.Generator().manual_seed(8)
    x = [torch.randn(3, 2, 40, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3)]

    def loss(name):
        def of(*operands):
            out, lse = attention(*operands, mask, kernel=name, return_lse=True)
            return out.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()

        return torch.func.vmap(torch.func.grad(of, argnums=(0, 1, 2)))

    for got, want in zip(loss(NAME)(*x), loss("torch/reference")(*x)):
        torch.testing.assert_close(got, want)


def test_it_is_not_differentiable_twice_and_says_so():
    x = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(9), requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x, x, x, Window(3, 3), kernel=NAME).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        gradient.sum().backward()
    assert not kernel(NAME).declaration(problem_of(Window(3, 3), 40, 40)[0]).backward.double


def test_a_problem_without_a_mask_is_one_tile_and_for_others():
    problem, _ = problem_of(Window(0, 0), 40, 40, bias=None)
    (results,) = differences(problem, build(problem, seed=10), by_kernel(NAME))
    assert all(results), "\n".join(map(str, results))
    x = torch.randn(1, 8, 2, 8)
    assert explain(x, x, x)[NAME].seconds > explain(x, x, x)["torch/flash"].seconds


def test_strips_at_the_borders_of_a_plane_run_together_with_those_between():
    mask = Neighborhood((56, 56), kernel_size=7).bind(56 * 56, 56 * 56)
    (part,) = boxes.parts_of(mask, False, torch.empty(0))
    assert part.counts == (7,)
    assert [run.mask.shape[1] for run in part.runs] == [7, 7, 7], "a mask for each strip"
    assert len(boxes.parts_of(mask, False, torch.empty(0), joined=False)) == 3, "two borders, and what is between"


def test_masks_of_strips_that_would_be_large_are_shared_instead():
    mask = Neighborhood((64, 256), kernel_size=13).bind(64 * 256, 64 * 256)
    parts = boxes.parts_of(mask, True, torch.empty(0))
    assert len(parts) == 3
    assert {run.mask.shape[1] for part in parts for run in part.runs} == {1}


def test_a_stretch_that_is_widened_has_the_same_keys():
    first, end = torch.tensor([5, 5, 6, 7]), torch.tensor([8, 9, 9, 10])
    (stretch,) = stretches(first, end, 4)
    wide = widened(stretch, 7, 10)
    assert (wide.k0, wide.columns) == (3, 7), "moved back from the end of the axis"
    columns = wide.k0 + torch.arange(7)
    assert wide.keep.equal((columns >= first[:, None]) & (columns < end[:, None]))
    assert widened(stretch, stretch.columns, 10) is stretch
