"""A device that nobody declared gets an answer, or a reason."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from attn_core import (
    ALiBi,
    Cached,
    Causal,
    KeyPadding,
    Neighborhood,
    PrefixLM,
    Segments,
    TensorBias,
    Window,
    attention,
    explain,
    mask_mod,
    score_mod,
)
from torch._subclasses.fake_tensor import FakeTensorMode

# A backend of its own in a process of its own: torch has room for one. Data lies on the CPU, beside each tensor.
TOY_BACKEND = """
import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakTensorKeyDictionary

_setup_privateuseone_for_python_backend("toy")
data = WeakTensorKeyDictionary()


def toy(cpu):
    tensor = torch._C._acc.create_empty_tensor(list(cpu.shape), cpu.dtype)
    data[tensor] = cpu.contiguous()
    return tensor


def on_cpu(x):
    if isinstance(x, torch.Tensor) and x.device.type == "toy":
        return data[x]
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "toy" else x


def fallback(op, *args, **kwargs):
    out = op(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    return tree_map(lambda x: toy(x) if isinstance(x, torch.Tensor) else x, out)


def view(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    aten.impl(name, lambda *args, **kwargs: fallback(op, *args, **kwargs), "PrivateUse1")


def to_copy(x, dtype=None, layout=None, device=None, **ignored):
    cpu = on_cpu(x).to(dtype) if dtype else on_cpu(x).clone()
    return cpu if device is not None and torch.device(device).type == "cpu" else toy(cpu)


every = torch.library.Library("_", "IMPL")
every.fallback(fallback, "PrivateUse1")
aten = torch.library.Library("aten", "IMPL")
aten.impl("_to_copy", to_copy, "PrivateUse1")
for name in ("transpose.int", "view", "expand", "unsqueeze", "_unsafe_view", "permute", "slice.Tensor", "select.int"):
    view(name)
"""

USE = """
import attn_core as A

query, key, value = (torch.randn(2, 5, 4, 8) for _ in range(3))
operands = [toy(x) for x in (query, key, value)]
for options in ({}, {"bias": A.Causal()}, {"softcap": 3.0}):
    verdict = A.explain(*operands, **options)
    out = A.attention(*operands, **options)
    assert out.device.type == "toy", out.device
    torch.testing.assert_close(data[out], A.attention(query, key, value, **options))
    assert verdict["torch/flash"].refused_fields[0] == "device", verdict
    print(verdict.chosen)
try:
    A.attention(*operands, kernel="torch/flash")
except A.KernelRefusedError as error:
    print(error)
"""


def test_a_private_backend_is_served_by_the_kernels_that_take_any_device():
    done = subprocess.run([sys.executable, "-c", TOY_BACKEND + USE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["torch/math", "torch/math", "torch/reference"]
    assert "  device: takes cpu, got toy" in lines[4]


WITHOUT_DATA = {"fake": (FakeTensorMode, "cpu"), "meta": (nullcontext, "meta")}
#: Made where they are used, as what they hold is without data, too.
BIASES = {
    "boolean": lambda device: torch.ones(64, 64, dtype=torch.bool, device=device),
    "floating": lambda device: TensorBias(torch.zeros(4, 64, 64, device=device, requires_grad=True)),
    "of another dtype": lambda device: torch.zeros(64, 64, dtype=torch.float64, device=device),
    "Causal": lambda device: Causal(),
    "Window": lambda device: Window(5, 0),
    "KeyPadding": lambda device: KeyPadding(torch.tensor([3, 64])),
    "Segments": lambda device: Segments([20, 44]) & Causal(),
    "PrefixLM": lambda device: PrefixLM([7, 9]),
    "Cached": lambda device: Cached(torch.tensor([3, 64]), within=Window(5, 0, "bottom-right")),
    "Neighborhood": lambda device: Neighborhood((8, 8), kernel_size=3),
    "ALiBi": lambda device: ALiBi(4),
    "ALiBi and Window": lambda device: ALiBi(4) + Window(5, 0),
    "mask_mod": lambda device: mask_mod(lambda b, h, q, k: q - k < 9),
    "score_mod": lambda device: score_mod(lambda score, b, h, q, k: score + (q - k)),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("where", WITHOUT_DATA)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
def test_every_kernel_that_takes_tensors_without_data_answers_with_tensors_without_data(name, where, requires_grad):
    mode, device = WITHOUT_DATA[where]
    with mode():
        inputs = [torch.empty(2, 64, n, 8, device=device, requires_grad=requires_grad) for n in (4, 2, 2)]
        bias = BIASES[name](device)
        takes = [verdict.kernel for verdict in explain(*inputs, bias) if verdict.seconds is not None]
        assert "torch/reference" in takes
        for kernel in (None, *takes):
            out = attention(*inputs, bias, kernel=kernel)
            assert out.shape == inputs[0].shape
            assert out.device.type == device
            assert out.is_meta or type(out).__name__ == "FakeTensor"
            if requires_grad:
                gradients = torch.autograd.grad(out.sum(), inputs)
                assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize("bias", [Window(5, 0), Neighborhood(61, kernel_size=3)], ids=["window", "neighborhood"])
def test_what_torch_flex_makes_of_a_mask_among_fake_tensors_is_not_kept_for_real_ones(bias):
    def asked():
        inputs = [torch.ones(2, 61, 4, 8) for _ in range(3)]
        return attention(*inputs, bias, kernel="torch/flex", return_lse=True)

    with FakeTensorMode():
        out, lse = asked()
        assert out.shape == (2, 61, 4, 8)
        assert lse.shape == (2, 4, 61)
    out, lse = asked()
    keys = bias.bind(61, 61).materialize().sum(-1)
    torch.testing.assert_close(out, torch.ones(2, 61, 4, 8))
    torch.testing.assert_close(lse, (8**0.5 + keys.float().log()).expand(2, 4, 61))
