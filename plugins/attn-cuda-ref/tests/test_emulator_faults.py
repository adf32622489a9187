"""Each kind of mistake that a kernel can make is reported: what, which block and thread, and which line.

A kernel below has its mistake in a line that ends with `// HERE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attn_cuda_ref.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import SCHEDULES, EmulatedLauncher
from emu.faults import KernelError
from emu.toolchain import missing_tool

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)

ONE = torch.zeros(1)
HEAD = '#include "primitives.cuh"\n'


def kernel(parameters, body):
    return f'{HEAD}extern "C" __global__ void broken({parameters}) {{\n{body}\n}}\n'


def launch(
    text, *arguments, build="plain", schedule="forward", block=64, grid=1, shared=4096, patience=30, **constants
):
    function = EmulatedLauncher(build, schedule=schedule, patience=patience).compile(text, "broken", constants)
    function.launch((grid, 1, 1), (block, 1, 1), shared, arguments)


def fault_of(text, *arguments, **options):
    """The message of the launch; it names the marked line, if there is one."""
    with pytest.raises(KernelError) as caught:
        launch(text, *arguments, **options)
    message = str(caught.value)
    marked = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith("// HERE")]
    for number in marked:
        assert f"broken.cu:{number}" in message, message
    return message


# ---- races --------------------------------------------------------------------------------------------------------

EXCHANGE = kernel(
    "int* out",
    """  SharedMemory shared;
  int* array = shared.take<int>(64);
  array[threadIdx.x] = 0;
  __syncthreads();
  array[threadIdx.x] = threadIdx.x;  // HERE
  BETWEEN
  out[threadIdx.x] = array[(threadIdx.x + STEP) % 64];  // HERE""",
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("between", "step"),
    [
        pytest.param("", 1, id="nothing between neighbours"),
        pytest.param("__syncwarp();", 32, id="a barrier of the warp between warps"),
        pytest.param("__shfl_sync(~0u, 1, 0);", 1, id="a shuffle, which orders no memory"),
        pytest.param("if (threadIdx.x < 32) barrier_sync(1, 32);", 1, id="a barrier of one of two warps"),
    ],
)
def test_a_race_is_reported_with_both_lines_in_every_schedule(between, step, schedule):
    constants = {"BETWEEN": between, "STEP": step}
    message = fault_of(EXCHANGE, torch.empty(64).int(), build="checked", schedule=schedule, **constants)
    assert message.startswith("race: element")
    assert "no barrier orders the two" in message
    assert "broken, block (0, 0, 0), thread" in message


@pytest.mark.parametrize("between", ["__syncthreads();", "barrier_sync(3, 64);"])
def test_with_a_barrier_there_is_no_race(between):
    out = torch.empty(64).int()
    launch(EXCHANGE, out, build="checked", BETWEEN=between, STEP=1)
    assert torch.equal(out, (torch.arange(64).int() + 1) % 64)


def test_within_a_warp_its_own_barrier_is_enough():
    out = torch.empty(32).int()
    text = EXCHANGE.replace("64", "32")
    launch(text, out, build="checked", block=32, BETWEEN="__syncwarp();", STEP=1)
    assert torch.equal(out, (torch.arange(32).int() + 1) % 32)


def test_a_buffer_that_is_filled_again_while_others_still_read_it_is_a_race():
    text = kernel(
        "int* out",
        """  SharedMemory shared;
  int* array = shared.take<int>(64);
  int sum = 0;
  for (int i = 0; i < 2; i++) {
    array[threadIdx.x] = threadIdx.x * i;  // HERE
    __syncthreads();
    sum += array[63 - threadIdx.x];  // HERE
  }
  out[threadIdx.x] = sum;""",
    )
    assert "race" in fault_of(text, torch.empty(64).int(), build="checked")


def test_two_blocks_that_write_one_element_race():
    text = kernel("int* out", "  if (threadIdx.x == 3) out[5] = 7;  // HERE")
    message = fault_of(text, torch.empty(64).int(), build="checked", grid=2)
    assert "race: element [5] of argument 0 (int32 [64]) is written" in message
    assert "thread 3 of another block" in message


def test_an_element_that_several_threads_only_read_is_no_race():
    text = kernel("const int* given, int* out", "  out[threadIdx.x + 64 * blockIdx.x] = given[0] + out[128];")
    out = torch.zeros(129).int()
    launch(text, torch.ones(1).int(), out, build="checked", grid=2)
    assert out[:128].eq(1).all()


# ---- out of bounds ------------------------------------------------------------------------------------------------

READ = kernel("const float* given, float* out, int at", "  if (threadIdx.x == 40) out[0] = given[at];  // HERE")


@pytest.mark.parametrize(
    ("given", "at", "where"),
    [
        pytest.param(torch.zeros(10), 12, r"8 bytes past the end of argument 0 (float32 [10])", id="behind"),
        pytest.param(torch.zeros(20)[10:], -1, r"4 bytes before argument 0 (float32 [10])", id="before"),
        pytest.param(torch.zeros(4, 5)[:, :3], 9, "between the elements, of argument 0 (float32 [4, 3])", id="between"),
        pytest.param(torch.zeros(4, 1).expand(4, 6), 4, "0 bytes past the end of argument 0", id="an expanded tensor"),
    ],
)
def test_an_access_outside_a_tensor_names_it(given, at, where):
    message = fault_of(READ, given, torch.zeros(1), at, build="checked")
    assert message.startswith("out of bounds: 4 bytes at ")
    assert where in message
    assert "thread 40 (warp 1, lane 8)" in message


@pytest.mark.parametrize("at", [0, 2, 5, 17])
def test_every_element_of_a_strided_tensor_may_be_read(at):
    launch(READ, torch.zeros(4, 5)[:, :3], torch.zeros(1), at, build="checked")


def test_memory_that_is_not_there_ends_the_launch_and_not_the_process():
    message = fault_of(READ, torch.zeros(10), torch.zeros(1), 2**30)
    assert message.startswith("out of bounds: ")
    assert "thread 40" in message


def test_a_pointer_that_was_none_is_not_there_either():
    assert "out of bounds: " in fault_of(READ, None, torch.zeros(1), 0)


def test_a_write_through_a_pointer_to_const_is_reported():
    text = kernel("const float* given", "  ((float*)given)[threadIdx.x] = 1;  // HERE")
    assert "through a pointer to const" in fault_of(text, torch.zeros(64), build="checked")


OVERRUN = kernel(
    "float* out",
    """  SharedMemory shared;
  float* first = shared.take<float>(16);
  float* array = shared.take<float>(64);  // HERE
  first[threadIdx.x % 16] = 0;
  __syncwarp();
  array[(int)threadIdx.x + PAST] = 1;
  __syncthreads();
  out[threadIdx.x] = array[threadIdx.x];""",
).replace("first[threadIdx.x % 16] = 0;", "if (threadIdx.x < 16) first[threadIdx.x] = 0;")


@pytest.mark.parametrize("past", [1, -3], ids=["behind", "before"])
@pytest.mark.parametrize("build", ["plain", "checked"])
def test_an_overrun_of_a_shared_array_names_where_it_was_taken(build, past):
    message = fault_of(OVERRUN, torch.zeros(64), build=build, PAST=past)
    assert "shared" in message
    assert "array of 256 bytes" in message


def test_more_shared_memory_than_was_given_is_reported():
    message = fault_of(OVERRUN, torch.zeros(64), shared=256, PAST=0)
    assert "the kernel takes 320 bytes, and 256 were given at the launch" in message


def test_threads_that_take_different_arrays_are_reported():
    text = kernel("", "  SharedMemory shared; float* array = shared.take<float>(threadIdx.x < 5 ? 8 : 4);  // HERE")
    assert "this thread takes 16 bytes as array 0, where another took 32" in fault_of(text)


# ---- what was not written -------------------------------------------------------------------------------------------


def test_shared_memory_that_nobody_wrote_is_reported():
    text = kernel(
        "float* out",
        """  SharedMemory shared;
  float* array = shared.take<float>(64);
  if (threadIdx.x != 9) array[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = array[threadIdx.x];  // HERE""",
    )
    message = fault_of(text, torch.zeros(64), build="checked")
    assert message.startswith("unwritten: element 9 of the shared array taken at broken.cu:4")
    assert "thread 9" in message


COPIED = kernel(
    "const float* given, float* out",
    """  SharedMemory shared;
  float* array = shared.take<float>(64);
  array[threadIdx.x] = 0;
  __syncthreads();
  cp_async<4>(array + threadIdx.x, given + threadIdx.x, true);
  cp_async_commit();
  WAIT
  out[threadIdx.x] = array[threadIdx.x ^ STEP];  // HERE""",
)


@pytest.mark.parametrize("wait", ["", "cp_async_wait<1>();", "__syncthreads();"])
def test_a_copy_that_was_not_waited_for_is_reported(wait):
    message = fault_of(COPIED, torch.ones(64), torch.zeros(64), build="checked", WAIT=wait, STEP=0)
    assert message.startswith("a copy is on its way: element 0 of the shared array")


def test_a_copy_that_arrived_is_there_for_others_only_behind_a_barrier():
    arguments = torch.ones(64), torch.zeros(64)
    assert "race" in fault_of(COPIED, *arguments, build="checked", schedule="backward", WAIT=WAITED, STEP=1)
    launch(COPIED, *arguments, build="checked", WAIT=WAITED + "__syncthreads();", STEP=1)
    assert arguments[1].eq(1).all()


WAITED = "cp_async_wait<0>();"


def test_a_copy_to_an_address_that_is_not_aligned_is_reported():
    text = COPIED.replace("cp_async<4>(array + threadIdx.x,", "cp_async<16>(array + threadIdx.x,")
    assert "cp.async of 16 bytes: an address is no multiple of 16" in fault_of(
        text.replace("  // HERE", ""), torch.ones(128), torch.zeros(64), WAIT="", STEP=0
    )


# ---- threads that do not meet ---------------------------------------------------------------------------------------


def test_a_barrier_that_some_threads_never_reach_is_a_deadlock():
    text = kernel("", "  if (threadIdx.x < 40)\n    __syncthreads();  // HERE")
    message = fault_of(text)
    assert message.startswith("deadlock: this thread has left the kernel, and every other waits")
    assert "threads 0 to 39 wait in __syncthreads at broken.cu:4" in message
    assert "threads 40 to 63 have left the kernel" in message


def test_barriers_of_two_branches_do_not_meet():
    text = kernel("", "  if (threadIdx.x < 40)\n    __syncthreads();  // HERE\n  else\n    __syncthreads();  // HERE")
    assert fault_of(text).startswith("divergence: threads of one block are at different __syncthreads")


def test_lanes_that_wait_in_different_operations_are_a_deadlock():
    text = kernel(
        "int* out",
        """  if (threadIdx.x < 5)
    out[0] = __shfl_sync(~0u, 1, 0);  // HERE
  else
    __syncwarp();  // HERE""",
    )
    message = fault_of(text, torch.zeros(1).int(), block=32)
    assert message.startswith("deadlock: every thread waits")
    assert "threads 0 to 4 wait in a shuffle of the lanes 0xffffffff" in message
    assert "threads 5 to 31 wait in __syncwarp" in message


def test_a_mask_without_the_calling_lane_is_reported():
    text = kernel("", "  __syncwarp(0xff);  // HERE")
    assert "__syncwarp of the lanes 0x000000ff by lane 8, which is none of them" in fault_of(text)


def test_a_shuffle_from_a_lane_outside_the_mask_is_reported():
    text = kernel(
        "int* out", "  if (threadIdx.x < 16)\n    out[threadIdx.x] = __shfl_down_sync(0xffffu, 1, 4);  // HERE"
    )
    assert "lane 12 reads lane 16, which is none of them" in fault_of(text, torch.zeros(64).int(), block=32)


def test_a_named_barrier_that_is_one_warp_short_is_a_deadlock():
    text = kernel("", "  barrier_sync(2, blockDim.x - 32 * (threadIdx.x / 64));  // HERE")
    assert "barrier 2 for 64 threads, where another thread came to it for 96" in fault_of(text, block=96)
    short = kernel("", "  if (threadIdx.x < 32)\n    barrier_sync(2, 64);  // HERE")
    assert "threads 0 to 31 wait in barrier_sync of barrier 2" in fault_of(short)


@pytest.mark.parametrize(("barrier", "says"), [("0, 32", "there are barriers 1 to 15"), ("1, 40", "takes whole warps")])
def test_a_named_barrier_that_no_gpu_has_is_reported(barrier, says):
    assert says in fault_of(kernel("", f"  barrier_sync({barrier});  // HERE"))


def test_half_a_warp_at_a_named_barrier_is_reported():
    text = kernel("", "  if (threadIdx.x % 32 < 16)\n    barrier_sync(1, 32);  // HERE")
    assert "only some lanes of a warp came to it" in fault_of(text)


def test_ldmatrix_of_a_row_that_is_not_aligned_is_reported():
    text = kernel(
        "unsigned* out",
        """  SharedMemory shared;
  f16* rows = shared.take<f16>(512);
  unsigned r[4];
  ldmatrix<4>(r, rows + 4 * threadIdx.x);  // HERE
  out[0] = r[0];""",
    )
    assert "no multiple of 16 bytes" in fault_of(text, torch.zeros(1).int(), block=32)


def test_a_thread_that_waits_in_a_loop_for_another_is_reported():
    text = kernel(
        "volatile int* flag",
        """  if (threadIdx.x == 0) {
    while (flag[0] == 0) flag[1]++;  // HERE
  } else {
    flag[0] = 1;
  }""",
    )
    message = fault_of(text, torch.zeros(2).int(), patience=1)
    assert message.startswith("this thread runs in a circle: 1 seconds without meeting another")
    assert "thread 0 (warp 0, lane 0)" in message


# ---- arithmetic and stack -------------------------------------------------------------------------------------------


def test_a_division_of_an_integer_by_zero_is_reported():
    text = kernel("int* out, int by", "  out[threadIdx.x] = out[0] / by;  // HERE")
    assert fault_of(text, torch.zeros(64).int(), 0).startswith("an integer is divided by zero")


def test_local_variables_that_overflow_the_stack_are_reported():
    body = "  volatile float local[1 << 20];\n  local[at] = 1;  // HERE\n  out[0] = local[at];"
    message = fault_of(kernel("float* out, int at", body).replace("  // HERE", ""), ONE, (1 << 20) - 70000)
    assert "the thread's local variables overflow its stack of 256 KB" in message


# ---- after a fault, and what is refused before ----------------------------------------------------------------------


def test_after_a_fault_the_next_launch_runs():
    with pytest.raises(KernelError):
        launch(EXCHANGE, torch.empty(64).int(), build="checked", BETWEEN="", STEP=1)
    test_with_a_barrier_there_is_no_race("__syncthreads();")


def test_a_text_that_does_not_compile_says_the_line():
    with pytest.raises(CompileError, match=r"(?s)broken.*broken\.cu:3.*nonsense"):
        launch(kernel("", "  nonsense();"))


def test_a_shared_variable_that_nobody_could_watch_does_not_compile():
    with pytest.raises(CompileError, match="take arrays from SharedMemory"):
        launch(kernel("", "  __shared__ float array[32]; array[0] = 1;"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param((ONE, 1), "takes 3 arguments, and 2 are given", id="too few"),
        pytest.param((ONE, ONE, ONE), "parameter 2 is an int, and the argument is Tensor", id="a tensor for a number"),
        pytest.param((1, ONE, 1), "parameter 0 is a pointer, and the argument is int", id="a number for a tensor"),
        pytest.param((ONE, ONE, 1.0), "parameter 2 is an int, and the argument is float", id="a float for an int"),
        pytest.param((ONE, ONE, 2**40), "which an int cannot hold", id="too large a number"),
    ],
)
def test_arguments_that_do_not_fit_the_parameters_are_refused(arguments, says):
    with pytest.raises(TypeError, match=says):
        launch(READ, *arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block": 40}, "in whole warps of 32"),
        ({"block": 2048}, "32 to 1024 threads"),
        ({"grid": -1}, "a grid has"),
        ({"shared": 2**20}, "a block has 0 to 232448"),
    ],
)
def test_a_launch_that_no_gpu_takes_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        launch(READ, torch.zeros(1), torch.zeros(1), 0, **options)


def test_a_grid_without_blocks_runs_nothing():
    launch(READ, None, None, 0, grid=0)
