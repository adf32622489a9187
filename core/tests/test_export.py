"""torch.export, and tensors without data: the choice is made without a device."""

from __future__ import annotations

import pytest
import torch
from attn_core import Causal, KeyPadding, TensorBias, Window, as_bias, attention, explain
from torch._subclasses.fake_tensor import FakeTensorMode


class Layer(torch.nn.Module):
    def __init__(self, bias=None):
        super().__init__()
        self.bias = bias

    def forward(self, query, key, value):
        return attention(query, key, value, self.bias)


def operands(seqlen):
    return tuple(torch.randn(2, seqlen, 4, 32) for _ in range(3))


BIASES = [None, Causal(), Window(8, 0)]


@pytest.mark.parametrize("bias", BIASES, ids=["none", "causal", "window"])
@pytest.mark.parametrize(
    ("strict", "dim"),
    [(False, "bounded"), (False, "auto"), (True, "auto")],
    ids=["non-strict-bounded", "non-strict-auto", "strict-auto"],
)
def test_a_module_is_exported_for_every_length(bias, strict, dim):
    size = torch.export.Dim("seqlen", min=4, max=4096) if dim == "bounded" else torch.export.Dim.AUTO
    layer = Layer(bias)
    program = torch.export.export(layer, operands(64), dynamic_shapes=({1: size},) * 3, strict=strict)
    for seqlen in (16, 64, 200):
        inputs = operands(seqlen)
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


class LayerWithMask(torch.nn.Module):
    """Its mask, or the lengths of its padding, come with every call."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, query, key, value, data):
        return attention(query, key, value, self.make(data))


BATCH, SEQLEN = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seqlen", min=4, max=4096)
AS_ARGUMENTS = {
    "boolean": (lambda n: torch.rand(n, n) > 0.3, {0: SEQLEN, 1: SEQLEN}, as_bias),
    "floating": (lambda n: torch.randn(1, 1, n, n), {2: SEQLEN, 3: SEQLEN}, as_bias),
    "floating-of-another-dtype": (lambda n: torch.randn(n, n, dtype=torch.float64), {0: SEQLEN, 1: SEQLEN}, as_bias),
    "boolean-row": (lambda n: torch.rand(2, 1, 1, n) > 0.3, {0: BATCH, 3: SEQLEN}, as_bias),
    "key-padding": (lambda n: torch.tensor([3, n]), {0: BATCH}, KeyPadding),
    "mask-and-numbers": (
        lambda n: torch.randn(n, n),
        {0: SEQLEN, 1: SEQLEN},
        lambda tensor: TensorBias(tensor) + Window(8, 0),
    ),
}


@pytest.mark.parametrize("name", AS_ARGUMENTS)
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict-bounded", "strict-auto"])
def test_a_mask_may_be_an_argument_of_what_is_exported(name, strict):
    make, dims, to_bias = AS_ARGUMENTS[name]
    operand = {0: BATCH, 1: SEQLEN} if BATCH in dims.values() else {1: SEQLEN}
    dynamic = [operand, operand, operand, dims]
    if strict:
        dynamic = [dict.fromkeys(each, torch.export.Dim.AUTO) for each in dynamic]
    layer = LayerWithMask(to_bias)
    program = torch.export.export(layer, (*operands(64), make(64)), dynamic_shapes=tuple(dynamic), strict=strict)
    for seqlen in (16, 200):
        inputs = *operands(seqlen), make(seqlen)
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


def test_meta_tensors_get_an_answer():
    out, lse = attention(*(x.to("meta") for x in operands(8)), Causal(), return_lse=True)
    assert out.is_meta
    assert out.shape == (2, 8, 4, 32)
    assert lse.shape == (2, 4, 8)


def test_fake_tensors_get_an_answer():
    with FakeTensorMode():
        out = attention(*operands(8), Causal())
    assert out.shape == (2, 8, 4, 32)


def test_fake_tensors_of_an_absent_device_are_chosen_for_among_kernels_without_a_limit():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device to ask")
    with FakeTensorMode():
        inputs = [torch.empty(2, 8, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
        verdict = explain(*inputs)
        out = attention(*inputs)
    assert verdict.chosen == "torch/math"
    assert "compute_capability" in verdict["torch/flash"].refused_fields
    assert any("compute capability unknown" in note for note in verdict.notes)
    assert out.shape == (2, 8, 4, 64)
    assert out.device.type == "cuda"
