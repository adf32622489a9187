"""What the emulator builds, keeps, and gives a block to begin with."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attn_cuda_ref.launcher import TEXT

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import SCHEDULES, EmulatedLauncher
from emu.toolchain import missing_tool

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)

HEAD = '#include "primitives.cuh"\n'
FILL = HEAD + 'extern "C" __global__ void fill(int* out) { out[threadIdx.x] = NUMBER; }'
FRESH = (
    HEAD
    + """extern "C" __global__ void fresh(float* out, float* again) {
  SharedMemory shared;
  TYPE* array = shared.take<TYPE>(32);
  out[blockIdx.x * 32 + threadIdx.x] = to_float(array[threadIdx.x]);
  array[threadIdx.x] = from_float<TYPE>(1.0f);
  again[blockIdx.x * 32 + threadIdx.x] = to_float(array[threadIdx.x]);
}"""
)
EARLY = (
    HEAD
    + """extern "C" __global__ void early(const float* given, float* before, float* after) {
  SharedMemory shared;
  float* array = shared.take<float>(32);
  array[threadIdx.x] = 0.0f;
  cp_async<4>(array + threadIdx.x, given + threadIdx.x, true);
  cp_async_commit();
  before[threadIdx.x] = array[threadIdx.x];
  cp_async_wait<0>();
  after[threadIdx.x] = array[threadIdx.x];
}"""
)


def filled(launcher: EmulatedLauncher, number: int) -> torch.Tensor:
    out = torch.zeros(32, dtype=torch.int32)
    launcher.compile(FILL, "fill", {"NUMBER": number}).launch((1, 1, 1), (32, 1, 1), 0, [out])
    return out


def test_a_build_is_kept_by_its_content(tmp_path: Path) -> None:
    launcher = EmulatedLauncher(folder=tmp_path)
    assert filled(launcher, 3).eq(3).all()
    (first,) = tmp_path.glob("fill-*.so")
    made = first.stat().st_mtime_ns
    assert filled(EmulatedLauncher(folder=tmp_path), 3).eq(3).all()
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("fill-*.so")] == [made]
    assert filled(launcher, 4).eq(4).all()
    assert len(list(tmp_path.glob("fill-*.so"))) == 2


def test_a_change_of_an_included_text_is_a_new_build(tmp_path: Path) -> None:
    texts = tmp_path / "cuda"
    shutil.copytree(TEXT, texts)
    launcher = EmulatedLauncher(folder=tmp_path / "built", texts=texts)
    assert filled(launcher, 3).eq(3).all()
    changed = tmp_path / "changed"
    shutil.copytree(TEXT, changed)
    (changed / "scores.cuh").write_text((changed / "scores.cuh").read_text() + "\n// changed\n")
    assert filled(EmulatedLauncher(folder=tmp_path / "built", texts=changed), 3).eq(3).all()
    assert len(list((tmp_path / "built").glob("fill-*.so"))) == 2


def test_threads_that_build_and_launch_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    launcher = EmulatedLauncher(folder=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for number, out in enumerate(pool.map(lambda i: filled(launcher, i % 2), range(8))):
            assert out.eq(number % 2).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", ["float", "f16", "bf16"])
def test_shared_memory_begins_as_nan_in_every_block(schedule: str, number: str) -> None:
    out, again = torch.zeros(3, 32), torch.zeros(3, 32)
    function = EmulatedLauncher(schedule=schedule).compile(FRESH, "fresh", {"TYPE": number})
    function.launch((3, 1, 1), (32, 1, 1), 128, [out, again])
    assert out.isnan().all()
    assert again.eq(1).all()


def test_a_copy_in_the_background_is_nan_until_it_is_waited_for() -> None:
    given, before, after = torch.randn(32), torch.zeros(32), torch.zeros(32)
    EmulatedLauncher().compile(EARLY, "early", {}).launch((1, 1, 1), (32, 1, 1), 128, [given, before, after])
    assert before.isnan().all()
    assert torch.equal(after, given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"build": "fast"}, "there are plain, checked, tsan, asan"),
        ({"schedule": "fair"}, "there are forward, backward, random"),
        ({"build": "checked", "workers": 2}, "only the plain build has more than one"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EmulatedLauncher(**options)
