"""Probes: when they are asked, and how they ask whether there is a CUDA device without starting anything."""

from __future__ import annotations

import pytest
import torch
from attn_core import (
    Capabilities,
    Kernel,
    KernelRefusedError,
    Unusable,
    attention,
    explain,
    kernels,
    no_cuda,
    prefer,
    record,
    register,
)
from attn_core.registry import Registry


@pytest.mark.parametrize(
    ("built", "devices", "reason"),
    [(False, 0, "this torch is built without CUDA"), (True, 0, "torch sees no CUDA device here"), (True, 2, None)],
)
def test_the_reason_is_the_first_that_holds(monkeypatch, built, devices, reason):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    told = no_cuda()
    assert (told and (told.state, told.reason)) == (reason and ("unavailable", reason))


@pytest.mark.parametrize("devices", [0, 2])
def test_no_probe_of_an_installed_plugin_starts_cuda(monkeypatch, devices):
    def starts_cuda(*arguments):
        raise AssertionError("from here on no forked process may use CUDA")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "is_available", starts_cuda)
    monkeypatch.setattr(torch.cuda, "_lazy_init", starts_cuda)
    registry = Registry()
    for kernel in registry.kernels():
        condition = registry.condition(kernel)
        assert "no forked process" not in condition.reason, kernel.name
        of_cuda = all(declared.devices == {"cuda"} for declared in kernel.declarations)
        if devices == 0 and kernel.plugin == "torch" and of_cuda:
            assert condition.reason == "torch sees no CUDA device here"
    assert kernels("torch/*")


# When they are asked


def run(query, key, value, *, scale):
    raise AssertionError("it cannot run here")


@pytest.fixture
def far():
    """A kernel for another device than the calls are on, and how often it was probed."""
    asked = []

    def probe():
        asked.append(True)
        return Unusable("absent", "fastlib is not installed", "pip install fastlib")

    declared = Capabilities(devices={"cuda"}, dtypes={torch.float32}, head_dims=range(1, 257))
    with register(Kernel(name="far/attend", run=run, capabilities=declared, probe=probe)):
        yield asked


OPERANDS = (torch.zeros(1, 3, 2, 8),) * 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_call_asks_no_kernel_of_another_device(far, dynamic):
    with record() as calls:
        attention(*OPERANDS)
        torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")(*OPERANDS)
    assert not far, "a library for GPUs would be imported for a call on the CPU"
    assert "far/attend" not in calls.kernels


def test_who_asks_why_is_told_of_it_all_the_same(far):
    told = explain(*OPERANDS)["far/attend"]
    assert (told.state, told.fix) == ("absent", "pip install fastlib")
    assert far == [True]
    assert "far/attend" in str(explain(*OPERANDS))
    assert far == [True], "once"


def test_so_is_who_insists_on_it(far):
    absent = "kernel 'far/attend' is absent: fastlib is not installed"
    with prefer("far/*", strict=True), pytest.raises(KernelRefusedError, match=absent):
        attention(*OPERANDS)
    with pytest.raises(KernelRefusedError, match=absent):
        attention(*OPERANDS, kernel="far/attend")
