"""The driver as it is called: every code is looked at, and a process that forked is told."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attn_cuda_ref import compiler
from attn_cuda_ref.cache import SUFFIX, Cache
from attn_cuda_ref.compiler import Nvrtc
from attn_cuda_ref.driver import Driver, packed
from attn_cuda_ref.errors import CompileError, CudaError, ForkError
from attn_cuda_ref.gpu import GpuLauncher

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from doubled_cuda import INVALID_IMAGE, OUT_OF_MEMORY, DoubledDriver, DoubledNvrtc, as_float, as_int

SOURCE = '#include "simple_delta.cuh"\n'
ONE = (1, 1, 1)
ON_CPU = -1  # the index of a CPU tensor's device: these tests have no other tensors
STREAM = 0x5EA


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> DoubledNvrtc:
    library = DoubledNvrtc()
    of = Nvrtc(library)
    monkeypatch.setattr(compiler, "nvrtc", lambda: of)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM))
    return library


def launcher(folder: Path | None, library: DoubledDriver) -> GpuLauncher:
    return GpuLauncher(ON_CPU, (9, 0), Cache(folder), Driver(library))


def test_arguments_lie_in_eight_bytes_each_as_the_entry_reads_them() -> None:
    tensor = torch.arange(6.0)[2:]
    slots = packed([tensor, 7, -1, 0.25, None])
    assert len(slots) == 40
    of = [slots[i : i + 8] for i in range(0, 40, 8)]
    assert [as_int(of[0]), as_int(of[1]), as_int(of[2]), as_float(of[3]), as_int(of[4])] == [
        tensor.data_ptr(),
        7,
        -1,
        0.25,
        0,
    ]


def test_a_launch_is_queued_in_torch_s_stream_with_its_arguments(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver(arguments=3)
    tensor = torch.zeros(4)
    function = launcher(None, library).compile(SOURCE, "simple_delta", {})
    function.launch((5, 1, 1), (128, 1, 1), 1024, [tensor, 3, 0.5])
    (launch,) = library.launches
    assert (launch.function, launch.grid, launch.block, launch.shared_bytes, launch.stream) == (
        101,
        (5, 1, 1),
        (128, 1, 1),
        1024,
        STREAM,
    )
    assert (as_int(launch.slots[0]), as_int(launch.slots[1]), as_float(launch.slots[2])) == (tensor.data_ptr(), 3, 0.5)


def test_a_thread_without_a_context_gets_the_one_that_torch_uses(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver()
    launcher(None, library).compile(SOURCE, "simple_delta", {}).launch(ONE, ONE, 0, [])
    assert library.context == 0xC0
    assert library.called.count("cuDevicePrimaryCtxRetain") == 1


def test_a_grid_without_blocks_launches_nothing(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver()
    launcher(None, library).compile(SOURCE, "simple_delta", {}).launch((0, 1, 1), ONE, 0, [])
    assert not library.launches


def test_more_shared_memory_than_48_kib_is_asked_for_once(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver()
    function = launcher(None, library).compile(SOURCE, "simple_delta", {})
    for shared_bytes in (48 << 10, 50_000, 50_000, 60_000):
        function.launch(ONE, ONE, shared_bytes, [])
    assert library.shared_bytes_allowed == [50_000, 60_000]


def test_a_tensor_on_another_device_is_refused_and_not_launched(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver(arguments=1)
    function = GpuLauncher(3, (9, 0), Cache(None), Driver(library)).compile(SOURCE, "simple_delta", {})
    with pytest.raises(CudaError, match="takes tensors on cuda:3, got one on cpu"):
        function.launch(ONE, ONE, 0, [torch.zeros(1)])
    assert not library.launches


@pytest.mark.parametrize(
    "name",
    [
        "cuCtxGetCurrent",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernel",
    ],
)
def test_a_call_that_fails_is_an_error_with_its_name_code_and_words(nvrtc: DoubledNvrtc, name: str) -> None:
    library = DoubledDriver({name: INVALID_IMAGE})
    words = f"{name}: error 200, CUDA_ERROR_INVALID_IMAGE: what the driver says of it"
    with pytest.raises(CudaError, match=words):
        launcher(None, library).compile(SOURCE, "simple_delta", {}).launch(ONE, ONE, 60_000, [])


def test_a_code_that_the_driver_does_not_know_is_told_as_a_number(nvrtc: DoubledNvrtc) -> None:
    with pytest.raises(CudaError, match="cuInit: error 77777, unknown error"):
        Driver(DoubledDriver({"cuInit": 77777}))


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuLaunchKernel"])
def test_out_of_memory_is_torch_s_own_error(nvrtc: DoubledNvrtc, name: str) -> None:
    library = DoubledDriver({name: OUT_OF_MEMORY})
    with pytest.raises(torch.OutOfMemoryError, match=f"{name}: error 2, CUDA_ERROR_OUT_OF_MEMORY"):
        launcher(None, library).compile(SOURCE, "simple_delta", {}).launch(ONE, ONE, 0, [])


def test_after_a_fork_the_child_is_told_before_the_driver_is_called(nvrtc: DoubledNvrtc) -> None:
    library = DoubledDriver()
    function = launcher(None, library).compile(SOURCE, "simple_delta", {})
    before = len(library.called)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function.launch(ONE, ONE, 0, [])
        except ForkError as error:
            code = 0 if "spawn" in str(error) and len(library.called) == before else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    function.launch(ONE, ONE, 0, [])  # the parent goes on


def test_what_one_process_compiled_another_only_loads(nvrtc: DoubledNvrtc, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    first, second = DoubledDriver(), DoubledDriver()
    launcher(folder, first).compile(SOURCE, "simple_delta", {"HEAD_DIM": 8})
    launcher(folder, second).compile(SOURCE, "simple_delta", {"HEAD_DIM": 8})
    assert len(nvrtc.compiled) == 1
    assert first.loaded == second.loaded
    launcher(folder, second).compile(SOURCE, "simple_delta", {"HEAD_DIM": 16})
    assert len(nvrtc.compiled) == 2


def test_a_corrupt_file_is_compiled_anew(nvrtc: DoubledNvrtc, tmp_path: Path) -> None:
    folder, library = tmp_path / "kernels", DoubledDriver()
    launcher(folder, library).compile(SOURCE, "simple_delta", {})
    (path,) = folder.glob(f"*{SUFFIX}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    launcher(folder, library).compile(SOURCE, "simple_delta", {})
    assert len(nvrtc.compiled) == 2
    assert path.read_bytes() == whole
    assert library.loaded[0] == library.loaded[1]


def test_what_does_not_compile_is_not_kept(nvrtc: DoubledNvrtc, tmp_path: Path) -> None:
    folder, library = tmp_path / "kernels", DoubledDriver()
    nvrtc.log = "simple_delta.cu(1): error: no"
    with pytest.raises(CompileError):
        launcher(folder, library).compile(SOURCE, "simple_delta", {})
    assert not folder.exists()
    assert not library.loaded
