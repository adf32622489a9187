"""What stands between a kernel's text and the machine that runs it: compile a text, launch its entry.

There are two: `gpu.GpuLauncher`, by NVRTC and the CUDA driver, and the emulator of the tests, by a C++ compiler on a
CPU. Whatever launches kernels knows this interface alone, so that a kernel runs on both without knowing which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import Tensor

#: The folder of the kernels' text; `#include "name.cuh"` finds the files there.
TEXT = Path(__file__).parent / "cuda"

#: What an entry takes, one for each of its parameters: a pointer for a tensor, or null for None; `int` or `long long`;
#: `float`.
Argument: TypeAlias = Tensor | int | float | None
Dim3 = tuple[int, int, int]
Constants = Mapping[str, str | int]


class Function(Protocol):
    """A compiled entry."""

    def launch(self, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Runs `grid` blocks of `block` threads, each with `shared_bytes` of dynamic shared memory.

        On a GPU it is queued in torch's current stream of the tensors' device. A tensor is handed over as the address
        of its first element; its strides are arguments of their own. A grid without blocks runs nothing.

        Raises CudaError, or what the emulator found wrong.
        """
        ...


class Launcher(Protocol):
    """Something that runs CUDA C++."""

    def compile(self, source: str, entry: str, constants: Constants) -> Function:
        """The function `entry` of a text.

        Args:
            source: CUDA C++ without headers of CUDA or of C++; what it includes is in `TEXT`.
            entry: the name of an `extern "C" __global__` function in it.
            constants: macro -> its value, defined before the text. Values may be any tokens: a type, a number, nothing.

        Raises CompileError, with the first lines of the compiler's log.
        """
        ...
