"""cuda-ref/simple in the emulator beside the reference: what the conformance kit does not single out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core import ALiBi, AttnBias, Causal, KeyPadding, Problem, RelPosTable, Segments, TensorBias, attention
from attn_core.registry import registry
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import Inputs, build
from attn_cuda_ref.simple_launches import SimpleLaunches
from attn_cuda_ref.translate import translated

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from biases_to_try import BATCH, HEADS, SEED, scores
from emulated import simple

NAME = simple().name
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with registry.register(simple()):
        yield


def problem(bias: AttnBias | None = None, **changes: Any) -> Problem:
    plain: dict[str, Any] = {
        "batch": BATCH,
        "seqlen_q": 36,
        "seqlen_kv": 36,
        "num_heads": HEADS,
        "num_kv_heads": HEADS,
        "head_dim": 8,
        "head_dim_v": 8,
        "dtype": torch.float32,
        "device": "cpu",
        "scale": 8**-0.5,
        "requires_grad": True,
        "return_lse": True,
    }
    lengths = plain | changes
    bound = bias and bias.bind(lengths["seqlen_q"], lengths["seqlen_kv"])
    held = bound is not None and bound.requires_grad
    return Problem(**lengths, bias=bound and bound.without_data(), bias_requires_grad=held)


def check(asked: Problem, bias: AttnBias | None) -> None:
    """Every result and gradient within the error budget."""
    inputs = build(asked, seed=SEED, bias=bias and bias.bind(asked.seqlen_q, asked.seqlen_kv))
    (found,) = differences(asked, inputs, by_kernel(NAME))
    assert all(found), "\n".join(map(str, found))


@pytest.mark.parametrize("bias", scores(36, 36, trained=True), ids=repr)
def test_each_tensor_of_a_bias_gets_its_gradient(bias: Any) -> None:
    check(problem(bias), bias)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_slopes_are_trained_in_half_precision_though_the_output_is_rounded(dtype: torch.dtype) -> None:
    slopes = torch.linspace(0.1, 0.5, HEADS).requires_grad_()
    bias = ALiBi(HEADS, slopes, "top-left") + Causal("top-left")
    check(problem(bias, dtype=dtype, seqlen_q=97, seqlen_kv=97), bias)


def test_a_bias_alone_is_trained_where_operands_are_not() -> None:
    bias = RelPosTable(torch.randn(HEADS, 9, generator=torch.Generator().manual_seed(SEED)).requires_grad_(), 36)
    check(problem(bias, requires_grad=False), bias)


@pytest.mark.parametrize("needed", ["query", "key", "value"])
def test_one_operand_alone_gets_its_gradient(needed: str) -> None:
    inputs = build(replace(problem(), requires_grad=False, return_lse=False), seed=SEED)
    getattr(inputs, needed).requires_grad_()
    (got,) = torch.autograd.grad(run(inputs), [getattr(inputs, needed)], inputs.grad_out)
    (wanted,) = torch.autograd.grad(run(inputs, "torch/reference"), [getattr(inputs, needed)], inputs.grad_out)
    assert torch.allclose(got, wanted, atol=1e-5)


def run(inputs: Inputs, kernel: str = NAME) -> Any:
    return attention(inputs.query, inputs.key, inputs.value, inputs.bias, kernel=kernel, **inputs.options)


def test_an_lse_alone_is_differentiated() -> None:
    inputs = build(problem(Causal("top-left")), seed=SEED)
    assert inputs.grad_lse is not None
    got, wanted = (
        torch.autograd.grad(run(inputs, kernel)[1], [inputs.query, inputs.key], inputs.grad_lse)
        for kernel in (NAME, "torch/reference")
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted))


def test_the_lse_is_within_a_ten_thousandth_and_minus_infinity_where_a_row_is_empty() -> None:
    inputs = build(problem(KeyPadding([0, 21])), seed=SEED, bias=KeyPadding([0, 21]).bind(36, 36))
    _, lse = run(inputs)
    _, wanted = run(inputs, "torch/reference")
    assert torch.equal(lse.isneginf(), wanted.isneginf())
    assert lse[0].isneginf().all()
    assert (lse[1] - wanted[1]).abs().max() < 1e-4


def test_a_gradient_that_is_expanded_is_read_by_its_strides() -> None:
    inputs = build(replace(problem(), return_lse=False), seed=SEED)
    ones = torch.ones_like(run(inputs))
    operands = [inputs.query, inputs.key, inputs.value]
    expanded = torch.autograd.grad(run(inputs), operands, ones[:1, :1, :1, :1].expand_as(ones))
    assert all(torch.equal(a, b) for a, b in zip(expanded, torch.autograd.grad(run(inputs), operands, ones)))


def test_documents_that_share_a_batch_entry_are_as_they_are_alone() -> None:
    lengths = (5, 1, 0, 30)
    inputs = build(replace(problem(), return_lse=False, requires_grad=False), seed=SEED)
    packed = run(replace(inputs, bias=Segments(lengths, within=Causal())))
    start = 0
    for length in lengths:
        own = {name: getattr(inputs, name)[:, start : start + length] for name in ("query", "key", "value")}
        if length:
            alone = run(replace(inputs, **own, bias=Causal()))
            assert torch.allclose(packed[:, start : start + length], alone, atol=1e-6)
        start += length


@pytest.mark.parametrize("dims", [(1, 1), (7, 255), (256, 3), (129, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_head_sizes_that_are_not_the_same(dims: tuple[int, int], dtype: torch.dtype) -> None:
    head_dim, head_dim_v = dims
    check(problem(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, seqlen_q=19), None)


def test_logits_of_ten_thousand_give_no_nan() -> None:
    inputs = build(replace(problem(Causal("top-left")), scale=1.0), seed=SEED, magnitude=100.0)
    out, lse = run(inputs)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.abs().max() > 1e4


# As ops of torch


def described(bias: AttnBias | None) -> tuple[Any, ...]:
    return translated(bias and bias.bind(36, 36), torch.device("cpu"))


@pytest.mark.parametrize(
    "bias",
    [
        None,
        Causal("bottom-right") & KeyPadding([3, 36]),
        TensorBias(torch.zeros(36, 36).requires_grad_()) + ALiBi(HEADS, torch.ones(HEADS).requires_grad_()),
    ],
    ids=repr,
)
def test_the_forward_is_an_op_as_torch_wants_one(bias: Any) -> None:
    inputs = build(problem(), seed=SEED)
    operands = inputs.query, inputs.key, inputs.value
    torch.library.opcheck(
        torch.ops.attn_cuda_ref.simple_forward.default,
        (*operands, *described(bias), 0.3, 4.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_backward_is_an_op_as_torch_wants_one() -> None:
    inputs = build(replace(problem(), requires_grad=False), seed=SEED)
    operands = inputs.query, inputs.key, inputs.value
    given = described(TensorBias(torch.zeros(36, 36)))
    out, lse = torch.ops.attn_cuda_ref.simple_forward(*operands, *given, 0.3, None)
    torch.library.opcheck(
        torch.ops.attn_cuda_ref.simple_backward.default,
        (inputs.grad_out, None, *operands, out, lse, *given, 0.3, None, [True, False, True], [1, 1]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_another_length_compiles_nothing() -> None:
    compiled: list[str] = []

    class Counting:
        def compile(self, source: str, entry: str, constants: Any) -> Any:
            compiled.append(entry)
            return self

        def launch(self, *given: Any) -> None:
            pass

    launches = SimpleLaunches(lambda device: Counting())
    for seqlen, left in ((36, 3), (50, 9)):
        query, key, value = torch.randn(3, BATCH, seqlen, HEADS, 8)
        for bias in (KeyPadding([seqlen, 1]), Causal("top-left") + ALiBi(HEADS, torch.ones(HEADS))):
            launches.forward(query, key, value, translated(bias.bind(seqlen, seqlen), query.device), 1.0 / left, None)
    assert compiled == ["simple_forward"] * 2
