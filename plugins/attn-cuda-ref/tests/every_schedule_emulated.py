"""All launches of cuda-ref/simple in every schedule, watched, and under ThreadSanitizer and AddressSanitizer.

A minute or two: `nox -s cuda_emulated` runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attn_core import Problem
from attn_core.testing.differences import Results, differences, results_of
from attn_core.testing.problems import build

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import EmulatedLauncher
from emu.toolchain import missing_tool
from simple_directly import directly
from simple_problems import PROBLEMS

for build_name in ("plain", "tsan", "asan"):
    if missing_tool(build_name):
        pytest.skip(f"the emulator cannot be built: {missing_tool(build_name)}", allow_module_level=True)


@pytest.fixture(params=PROBLEMS)
def asked(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


def results(asked: Problem, build_name: str, **options: object) -> Results:
    inputs = build(asked, seed=2, bias=asked.bias, layout="packed")
    return results_of(directly(EmulatedLauncher(build_name, **options)), asked, inputs)


SCHEDULES = [("forward", 0), ("backward", 0), ("random", 1), ("random", 2), ("random", 3)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_the_same_to_the_bit_in_every_schedule(asked, schedule, seed, workers):
    expected = results(asked, "plain")
    found = results(asked, "plain", schedule=schedule, seed=seed, workers=workers)
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES[:3])
@pytest.mark.parametrize("build_name", ["checked", "tsan", "asan"])
def test_nothing_is_found_by_those_who_watch(asked, build_name, schedule, seed):
    inputs = build(asked, seed=2, bias=asked.bias)
    [comparisons] = differences(asked, inputs, directly(EmulatedLauncher(build_name, schedule=schedule, seed=seed)))
    assert all(comparisons), "\n".join(map(str, comparisons))
