"""The emulator as a launcher: what runs kernels on a GPU runs them here, on a CPU, one thread after the other.

A launch that goes wrong raises KernelFault, which says what, in which block and thread, and in which line of the
kernel's text. What each build finds is in `toolchain.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from arguments import Index, Launch, Parameter, Region, bytes_of, region, values
from attn_cuda_ref.launcher import Argument, Constants, Dim3
from toolchain import HERE, Toolchain

SCHEDULES = ("forward", "backward", "random")
MESSAGE_ROOM = 8192
WARP, MOST_THREADS = 32, 1024
#: What a block may have at most on any GPU that the package knows (sm_90, sm_100).
MOST_SHARED_BYTES = 227 * 1024
#: How far from a tensor an address may lie and still be described by it.
NEAR = 1 << 20


class KernelFault(RuntimeError):
    """What a kernel did that CUDA does not allow."""


class EmulatedLauncher:
    """Compiles kernels with g++ and runs them on a CPU.

    Args:
        build: "plain" (fast), "checked" (watches every access), "tsan" or "asan" (a process of its own).
        schedule: which thread goes on where several can: "forward" the lowest, "backward" the highest, "random" any.
        seed: of the random schedule.
        workers: OS threads that take blocks; the checked build and the sanitizers have one.
        folder: of what is built; by default one that lasts as long as the process.
    """

    def __init__(
        self,
        build: str = "plain",
        *,
        schedule: str = "forward",
        seed: int = 0,
        workers: int = 1,
        folder: Path | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: there are {', '.join(SCHEDULES)}")
        if workers < 1 or (build != "plain" and workers != 1):
            raise ValueError(f"workers={workers} of build {build!r}: only the plain build has more than one")
        self.toolchain = Toolchain(build, folder or folder_of_process())
        self.build, self.schedule, self.seed, self.workers = build, schedule, seed, workers

    def compile(self, source: str, entry: str, constants: Constants) -> EmulatedFunction | SanitizedFunction:
        """The function `entry`, built if it is not there; raises CompileError with the compiler's words."""
        path = self.toolchain.kernel(source, entry, constants)
        if self.toolchain.build.program:
            from sanitized import SanitizedFunction

            return SanitizedFunction(entry, path, self.build, SCHEDULES.index(self.schedule), self.seed)
        return EmulatedFunction(entry, path, self)


class EmulatedFunction:
    """An entry in a library."""

    def __init__(self, entry: str, path: Path, launcher: EmulatedLauncher) -> None:
        self.entry, self.path, self.launcher = entry, path, launcher
        self._library, self._launch = load(path, launcher.toolchain.runtime()[0])
        self._codes = parameter_codes(self._library)
        self._call = ctypes.cast(self._library.emu_call, ctypes.c_void_p)

    def launch(self, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Runs all blocks; raises KernelFault, or ValueError where no GPU would launch it."""
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
            seed=self.launcher.seed,
            message=ctypes.addressof(message),
            message_room=MESSAGE_ROOM,
        )
        if self._launch(ctypes.byref(launch)):
            raise KernelFault(explained(message.value.decode(), self.path, arguments))

    def _regions(self, arguments: Sequence[Argument]) -> ctypes.Array[Region]:
        tensors = [
            region(i, argument, self._codes[i] == "p")
            for i, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor) and argument.numel() > 0
        ]
        return (Region * len(tensors))(*tensors)


def check_launch(grid: Dim3, block: Dim3, shared_bytes: int) -> None:
    """Raises ValueError for what no GPU launches, and for blocks of broken warps, which no kernel here has."""
    threads = block[0] * block[1] * block[2]
    if threads < 1 or threads > MOST_THREADS or threads % WARP:
        raise ValueError(f"block={block}: a block has 32 to {MOST_THREADS} threads, in whole warps of {WARP}")
    if min(grid) < 0 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise ValueError(f"grid={grid}: a grid has fewer than 2**31 blocks along x, and 65535 at most along y and z")
    if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
        raise ValueError(f"shared_bytes={shared_bytes}: a block has 0 to {MOST_SHARED_BYTES}")


@cache
def folder_of_process() -> Path:
    """Where builds go when nobody says where: removed when the process ends, unless ATTN_EMULATOR_FOLDER names one."""
    named = os.environ.get("ATTN_EMULATOR_FOLDER")
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


# ---- messages: the runtime names code, addresses and arguments by numbers ----


def explained(message: str, library: Path, arguments: Sequence[Argument]) -> str:
    """A message in which code is a line, and an address an element of an argument."""
    message = re.sub(r"<code\+(0x[0-9a-f]+)>", lambda found: line_of(library, found[1]), message)
    message = re.sub(r"<address (0x[0-9a-f]+)>", lambda found: nearest(int(found[1], 16), arguments), message)
    return re.sub(
        r"<argument (\d+) byte (\d+)>", lambda found: element(int(found[1]), int(found[2]), arguments), message
    )


def line_of(library: Path, offset: str) -> str:
    """File and line of the kernel's text; of code that the compiler put into other code, the innermost of the kernel."""
    command = ["addr2line", "-i", "-e", str(library), offset]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return f"offset {offset} of {library.name}"
    lines = [line.split(" (")[0] for line in found]
    own = [line for line in lines if Path(line.rsplit(":", 1)[0]).parent != HERE] or lines
    path, _, number = own[0].rpartition(":")
    return f"{Path(path).name}:{number}"


def described(number: int, tensor: torch.Tensor) -> str:
    return f"argument {number} ({str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)})"


def element(number: int, byte: int, arguments: Sequence[Argument]) -> str:
    """Which element of a tensor lies at a byte."""
    tensor = arguments[number]
    assert isinstance(tensor, torch.Tensor)
    item, index = byte // tensor.element_size(), [0] * tensor.dim()
    for dim in sorted(range(tensor.dim()), key=tensor.stride, reverse=True):
        if tensor.shape[dim] > 1 and tensor.stride(dim) > 0:
            index[dim], item = divmod(item, tensor.stride(dim))
    return f"element {index} of {described(number, tensor)}"


def nearest(address: int, arguments: Sequence[Argument]) -> str:
    """Where an address that is no element lies, by the tensor that is nearest."""
    found = []
    for i, tensor in enumerate(arguments):
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            continue
        first, after = tensor.data_ptr(), tensor.data_ptr() + bytes_of(tensor)
        if address < first:
            found.append((first - address, f"{first - address} bytes before {described(i, tensor)}"))
        elif address >= after:
            found.append((address - after, f"{address - after} bytes past the end of {described(i, tensor)}"))
        else:
            found.append((0, f"byte {address - first}, between the elements, of {described(i, tensor)}"))
    distance, words = min(found, default=(NEAR, ""))
    return words if distance < NEAR else f"address {address:#x}, which is near no argument,"
