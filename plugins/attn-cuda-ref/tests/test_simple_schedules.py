"""cuda-ref/simple does not depend on who runs first; `every_schedule_emulated.py` has all schedules and who watches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_core import Causal, KeyPadding
from attn_core.testing.differences import differences, results_of
from attn_core.testing.problems import build

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import EmulatedLauncher
from emu.toolchain import missing_tool
from simple_directly import directly
from simple_problems import LENGTHS, PROBLEMS

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)

ASKED = PROBLEMS["causal and key padding"]
INPUTS = build(ASKED, seed=2, bias=ASKED.bias)


@pytest.mark.parametrize(("schedule", "workers"), [("forward", 2), ("backward", 1), ("random", 2)])
def test_results_are_the_same_to_the_bit_in_every_schedule(schedule, workers):
    expected = results_of(directly(EmulatedLauncher("plain")), ASKED, INPUTS)
    launcher = EmulatedLauncher("plain", schedule=schedule, seed=1, workers=workers)
    found = results_of(directly(launcher), ASKED, INPUTS)
    for name, result in expected.items():
        assert torch.equal(found[name], result), name


def test_no_access_of_any_launch_is_a_race_or_out_of_bounds():
    [comparisons] = differences(ASKED, INPUTS, directly(EmulatedLauncher("checked", schedule="random", seed=1)))
    assert all(comparisons), "\n".join(map(str, comparisons))


def test_results_do_not_depend_on_the_place_in_the_batch():
    kernel = directly(EmulatedLauncher("plain"))
    bias = (Causal("bottom-right") & KeyPadding(torch.tensor([0, 50]))).bind(*LENGTHS)
    turned = {name: getattr(INPUTS, name).flip(0) for name in ("query", "key", "value")}
    for here, there in zip(kernel(INPUTS), kernel(replace(INPUTS, **turned, bias=bias))):
        assert torch.equal(here, there.flip(0))
