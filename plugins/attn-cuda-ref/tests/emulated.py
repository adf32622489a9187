"""cuda-ref/simple on a CPU: the same declaration, the same ops, and the emulator where a GPU would be."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from attn_core import Kernel

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from attn_cuda_ref import ops
from attn_cuda_ref.kernels.simple import KERNEL
from emu.emulator import EmulatedLauncher
from emu.toolchain import missing_tool


@cache
def simple() -> Kernel:
    """The kernel, for the operands of a CPU. Skips the tests of a module where there is no C++ compiler."""
    if missing_tool():
        pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)
    launcher = EmulatedLauncher()
    ops.implement("CPU", lambda device: launcher)
    (declared,) = KERNEL.declarations
    on_cpu = replace(declared, devices=frozenset({"cpu"}), min_compute_capability=None)
    # Of another name: that of the plugin's own may be taken, where the plugin is installed.
    return replace(KERNEL, name="emulated/simple", capabilities=on_cpu, probe=None, costs={})
