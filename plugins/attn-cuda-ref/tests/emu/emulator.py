"""The emulator as a launcher: what runs kernels on a GPU runs them here, on a CPU, one thread after the other.

A launch that goes wrong raises KernelError, which says what, in which block and thread, and in which line of the
kernel's text. What each build finds is in `toolchain.py`.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from attn_cuda_ref.launcher import TEXT, Argument, Constants, Dim3

from .arguments import Index, Launch, Parameter, Region, check_launch, region, values
from .faults import KernelError, explained
from .sanitized import SanitizedFunction
from .toolchain import Toolchain

SCHEDULES = ("forward", "backward", "random")
MESSAGE_ROOM = 8192


class EmulatedLauncher:
    """Compiles kernels with g++ and runs them on a CPU.

    Args:
        build: "plain" (fast), "checked" (watches every access), "tsan" or "asan" (a process of its own).
        schedule: which thread goes on where several can: "forward" the lowest, "backward" the highest, "random" any.
        seed: of the random schedule.
        workers: OS threads that take blocks; the checked build and the sanitizers have one.
        patience: seconds of the CPU that a thread may run without meeting another or ending; the sanitizers have all.
        folder: of what is built; by default the one that CUDA_REF_EMULATOR names, or one of this process.
        texts: where a kernel's includes are.
    """

    def __init__(
        self,
        build: str = "plain",
        *,
        schedule: str = "forward",
        seed: int = 0,
        workers: int = 1,
        patience: int = 30,
        folder: Path | None = None,
        texts: Path = TEXT,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: there are {', '.join(SCHEDULES)}")
        if workers < 1 or (build != "plain" and workers != 1):
            raise ValueError(f"workers={workers} of build {build!r}: only the plain build has more than one")
        self.toolchain = Toolchain(build, folder or folder_of_process(), texts)
        self.build, self.schedule, self.seed = build, schedule, seed
        self.workers, self.patience = workers, patience

    def compile(self, source: str, entry: str, constants: Constants) -> EmulatedFunction | SanitizedFunction:
        """The function `entry`, built if it is not there; raises CompileError with the compiler's words."""
        runtime = self.toolchain.runtime()
        path = self.toolchain.kernel(source, entry, constants, runtime)
        if self.toolchain.build.program:
            return SanitizedFunction(entry, path, self.build, SCHEDULES.index(self.schedule), self.seed)
        return EmulatedFunction(entry, path, runtime[0], self)


class EmulatedFunction:
    """An entry in a library."""

    def __init__(self, entry: str, path: Path, runtime: Path, launcher: EmulatedLauncher) -> None:
        self.entry, self.path, self.launcher = entry, path, launcher
        self._library, self._launch = load(path, runtime)
        self._codes = parameter_codes(self._library)
        self._call = ctypes.cast(self._library.emu_call, ctypes.c_void_p)

    def launch(self, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Runs all blocks; raises KernelError, or ValueError where no GPU would launch it."""
        check_launch(grid, block, shared_bytes)
        if 0 in grid:
            return
        given = values(self.entry, self._codes, arguments)
        pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(value) for value in given))
        regions = self._regions(arguments)
        message = ctypes.create_string_buffer(MESSAGE_ROOM)
        launch = Launch(
            kernel=self.entry.encode(),
            grid=Index(*grid),
            block=Index(*block),
            shared_bytes=shared_bytes,
            call=self._call.value,
            arguments=ctypes.addressof(pointers),
            tensors=ctypes.addressof(regions),
            tensor_count=len(regions),
            schedule=SCHEDULES.index(self.launcher.schedule),
            workers=self.launcher.workers,
            patience=self.launcher.patience,
            seed=self.launcher.seed,
            message=ctypes.addressof(message),
            message_room=MESSAGE_ROOM,
        )
        if self._launch(ctypes.byref(launch)):
            raise KernelError(explained(message.value.decode(), self.path, arguments))

    def _regions(self, arguments: Sequence[Argument]) -> ctypes.Array[Region]:
        tensors = [
            region(i, argument, self._codes[i] == "p")
            for i, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor) and argument.numel() > 0
        ]
        return (Region * len(tensors))(*tensors)


@cache
def folder_of_process() -> Path:
    """Where builds go when nobody says where: removed when the process ends, unless CUDA_REF_EMULATOR names one."""
    named = os.environ.get("CUDA_REF_EMULATOR")
    if named:
        return Path(named)
    kept.append(tempfile.TemporaryDirectory(prefix="attn-emulator-"))
    return Path(kept[-1].name)


kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def load(path: Path, runtime: Path) -> tuple[ctypes.CDLL, ctypes._FuncPointer]:
    """A kernel's library, and the function of its runtime that launches."""
    return ctypes.CDLL(str(path)), ctypes.CDLL(str(runtime)).emu_launch


def parameter_codes(library: ctypes.CDLL) -> str:
    """A letter for each parameter of the entry: runtime.h says which."""
    library.emu_parameters.restype = ctypes.POINTER(Parameter)
    found, codes = library.emu_parameters(), ""
    while found[len(codes)].bytes:
        codes += found[len(codes)].code.decode()
    return codes
