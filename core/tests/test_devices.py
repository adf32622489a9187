"""A device that nobody declared gets an answer, or a reason."""

from __future__ import annotations

import subprocess
import sys

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
