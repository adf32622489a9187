"""A second opinion: the same text under ThreadSanitizer and AddressSanitizer, which know nothing of the emulator's own.

They say what they found in their own words; a kernel below has its mistake in the lines that end with `// HERE`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import SCHEDULES, EmulatedLauncher
from emu.faults import KernelError
from emu.toolchain import missing_tool

for build_name in ("plain", "tsan", "asan"):
    if missing_tool(build_name):
        pytest.skip(f"the emulator cannot be built: {missing_tool(build_name)}", allow_module_level=True)

PROBES = (Path(__file__).parent / "gpu" / "probes.cu").read_text()
EXCHANGE = """#include "primitives.cuh"
extern "C" __global__ void broken(const int* given, int* out) {
  SharedMemory shared;
  int* first = shared.take<int>(64);
  int* array = shared.take<int>(64);
  array[threadIdx.x] = given[threadIdx.x + BEYOND];  // HERE
  BETWEEN
  out[threadIdx.x] = array[(int)(threadIdx.x + STEP) % 64 + PAST];  // HERE
}
"""
FINE = {"BETWEEN": "__syncthreads();", "STEP": 1, "BEYOND": 0, "PAST": 0}


def launch(build, schedule="forward", blocks=1, **constants):
    given, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    launcher = EmulatedLauncher(build, schedule=schedule)
    launcher.compile(EXCHANGE, "broken", FINE | constants).launch((blocks, 1, 1), (64, 1, 1), 512, [given, out])
    return out


@pytest.mark.parametrize("build", ["tsan", "asan"])
def test_a_kernel_without_mistakes_passes_and_its_results_come_back(build):
    assert torch.equal(launch(build), (torch.arange(64).int() + 1) % 64)


def test_thread_sanitizer_reports_two_blocks_that_write_one_element():
    with pytest.raises(KernelError, match="data race"):
        launch("tsan", blocks=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("between", "step"),
    [
        pytest.param("", 1, id="nothing between neighbours"),
        pytest.param("__syncwarp();", 32, id="a barrier of the warp between warps"),
        pytest.param("__shfl_sync(~0u, 1, 0);", 1, id="a shuffle, which orders no memory"),
    ],
)
def test_thread_sanitizer_reports_a_race_with_both_lines_in_every_schedule(between, step, schedule):
    with pytest.raises(KernelError, match="data race") as caught:
        launch("tsan", schedule, BETWEEN=between, STEP=step)
    assert set(re.findall(r"broken\.cu:(\d+)", str(caught.value))) >= {"6", "8"}


@pytest.mark.parametrize(
    ("constants", "says", "line"),
    [
        pytest.param({"BEYOND": 1}, "heap-buffer-overflow", 6, id="a tensor"),
        pytest.param({"PAST": 1}, "use-after-poison", 8, id="behind a shared array"),
        pytest.param({"PAST": -1}, "use-after-poison", 8, id="before a shared array"),
    ],
)
def test_address_sanitizer_reports_an_access_out_of_bounds_with_its_line(constants, says, line):
    with pytest.raises(KernelError, match=says) as caught:
        launch("asan", **constants)
    assert f"broken.cu:{line}" in str(caught.value)


@pytest.mark.parametrize("build", ["tsan", "asan"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("entry", ["rotate", "pass_on"])
def test_barriers_are_barriers_to_the_sanitizers_too(build, schedule, entry):
    out = torch.full((128,), -1, dtype=torch.int32)
    function = EmulatedLauncher(build, schedule=schedule).compile(PROBES, entry, {})
    function.launch((1, 1, 1), (128, 1, 1), 1024, [out, 6])
    assert (out >= 0).all()
