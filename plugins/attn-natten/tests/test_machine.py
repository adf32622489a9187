"""Environment checks: False without CUDA and never an error, thresholds of compute capability with it."""

from __future__ import annotations

import attn_natten
import pytest
import torch
from attn_core import AttnError, Capabilities, Kernel, register
from attn_natten import machine
from attn_natten.errors import DeviceError
from attn_natten.utils import get_device_cc

CHECKS = (
    "has_half",
    "has_bfloat",
    "has_fna",
    "has_fused_na",
    "has_gemm",
    "has_tf32_gemm",
    "has_fp32_gemm",
    "has_fp64_gemm",
)


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch):
    """Two devices, of the compute capabilities that the test sets; torch's own answer to a device that is not there."""
    capabilities = [(9, 0), (7, 5)]

    def capability(device=None):
        index = (
            0
            if device is None
            else torch.device(device if isinstance(device, (str, torch.device)) else f"cuda:{device}").index or 0
        )
        if isinstance(device, torch.device) and device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        if not 0 <= index < len(capabilities):
            raise AssertionError("Invalid device id")
        return capabilities[index]

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    return capabilities


@pytest.fixture
def kernels_ready(monkeypatch):
    """Whether kernels of these names are ready is what the test says."""
    ready = set()
    monkeypatch.setattr(
        machine, "kernels", lambda pattern: [kernel_of(name) for name in ready if matches(name, pattern)]
    )
    monkeypatch.setattr(machine, "is_available", lambda name: name in ready)
    return ready


def matches(name, pattern):
    return name.startswith(pattern.rstrip("*"))


def kernel_of(name):
    def run(query, key, value, *, scale):
        raise AssertionError("is not run")

    return Kernel(
        name=name, run=run, capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={64})
    )


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("device", [(), (0,), (7,), ("cuda:0",), ("cpu",), ("nonsense",), (None,), ([],)], ids=repr)
@pytest.mark.parametrize("check", CHECKS)
def test_without_cuda_every_check_is_false_for_any_device(check, device):
    assert getattr(attn_natten, check)(*device) is False


@pytest.mark.usefixtures("without_cuda")
def test_without_cuda_there_is_none():
    assert attn_natten.has_cuda() is False


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("device", [(), (0,), ("cuda:1",)], ids=repr)
def test_without_cuda_the_capability_of_a_device_is_a_clear_error(device):
    with pytest.raises(
        RuntimeError, match=r"^get_device_cc: takes a CUDA device, got device_index=.* sees none$"
    ) as error:
        get_device_cc(*device)
    assert isinstance(error.value, AttnError)
    assert isinstance(error.value, DeviceError)


def test_a_torch_that_is_not_built_for_cuda_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as of ROCm
    monkeypatch.setattr(torch.version, "cuda", None)
    assert attn_natten.has_cuda() is False
    assert attn_natten.has_half() is False


@pytest.mark.usefixtures("with_cuda")
def test_the_capability_is_one_number_of_the_current_device_or_of_one_that_is_named():
    assert get_device_cc() == 90
    assert get_device_cc(1) == 75
    assert get_device_cc("cuda:1") == 75
    assert get_device_cc(torch.device("cuda", 1)) == 75
    assert attn_natten.has_cuda() is True


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize("device", [5, "cuda:9", torch.device("cpu")], ids=repr)
def test_a_device_that_is_not_there_is_an_error_of_the_capability_and_false_for_the_rest(device):
    with pytest.raises(DeviceError, match="^get_device_cc: takes one of 2 CUDA devices, got device_index=") as error:
        get_device_cc(device)
    assert repr(device) in str(error.value)
    assert error.value.__cause__ is not None
    assert attn_natten.has_half(device) is False


@pytest.mark.parametrize(
    ("capability", "half", "bfloat", "fna", "gemm", "tensor_gemm"),
    [
        ((3, 7), False, False, False, False, False),
        ((5, 0), True, False, True, False, False),
        ((6, 1), True, False, True, False, False),
        ((7, 0), True, False, True, True, False),
        ((7, 5), True, False, True, True, False),
        ((8, 0), True, True, True, True, True),
        ((12, 0), True, True, True, True, True),
    ],
    ids=str,
)
def test_each_check_has_its_least_capability(
    with_cuda, kernels_ready, capability, half, bfloat, fna, gemm, tensor_gemm
):
    with_cuda[1] = capability
    kernels_ready.update({"natten/cutlass-fna", "natten/gemm-na"})
    assert [getattr(attn_natten, check)(1) for check in CHECKS] == [
        half, bfloat, fna, fna, gemm, tensor_gemm, tensor_gemm, tensor_gemm,
    ]  # fmt: skip


@pytest.mark.usefixtures("with_cuda")
def test_kernels_that_are_not_ready_are_not_there(kernels_ready):
    assert attn_natten.has_half()
    for check in ("has_fna", "has_gemm", "has_tf32_gemm", "has_fp64_gemm"):
        assert getattr(attn_natten, check)() is False
    kernels_ready.add("natten/hopper-fna")
    assert attn_natten.has_fna()
    assert not attn_natten.has_gemm()
    kernels_ready.clear()
    kernels_ready.add("natten/flex-fna")  # torch's FlexAttention, which is no kernel of NATTEN's
    assert not attn_natten.has_fna()


@pytest.mark.usefixtures("with_cuda")
def test_a_kernel_that_is_registered_counts():
    with register(kernel_of("natten/gemm-1d")):
        assert attn_natten.has_gemm()
    assert not attn_natten.has_gemm()
