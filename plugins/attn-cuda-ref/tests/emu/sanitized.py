"""A launch under ThreadSanitizer or AddressSanitizer: in a process of its own, which gets the tensors in a file."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from attn_cuda_ref.launcher import Argument, Dim3

from .arguments import bytes_of, check_launch
from .faults import KernelError

#: A race ends the process with this status, and after the first report.
FOUND = 66
OPTIONS = {
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={FOUND}:report_thread_leaks=0:history_size=4",
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}:detect_stack_use_after_return=0",
}
REPORT_LINES = 40
HEADER = struct.Struct("<3I3IQQii")
GIVEN = struct.Struct("<8sii")


class SanitizedFunction:
    """An entry in a program."""

    def __init__(self, entry: str, program: Path, build: str, schedule: int, seed: int) -> None:
        self.entry, self.program, self.build, self.schedule, self.seed = entry, program, build, schedule, seed

    def launch(self, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Runs all blocks; raises KernelError with the sanitizer's report."""
        check_launch(grid, block, shared_bytes)
        if 0 in grid:
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "launch"
            header = HEADER.pack(*grid, *block, shared_bytes, self.seed, self.schedule, len(arguments))
            file.write_bytes(header + b"".join(map(given, arguments)) + b"".join(map(data, arguments)))
            command = [*without_random_layout(), str(self.program), self.entry, str(file)]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, env=os.environ | OPTIONS
            )
            if done.returncode != 0:
                raise KernelError(report(self.build, done.returncode, done.stderr))
            take_back(memoryview(file.read_bytes())[HEADER.size + GIVEN.size * len(arguments) :], arguments)


@cache
def without_random_layout() -> tuple[str, ...]:
    """ThreadSanitizer knows where memory lies; where layouts are very random, it is found elsewhere, and nothing runs.

    A container may forbid to ask for this; then the system's layout has to do.
    """
    wanted = ("setarch", "-R")
    allowed = shutil.which(wanted[0]) and subprocess.run([*wanted, "true"], capture_output=True).returncode == 0
    return wanted if allowed else ()


def given(argument: Argument) -> bytes:
    """One row of the file's table: the bits of a number, or how long a tensor is."""
    if isinstance(argument, torch.Tensor):
        return GIVEN.pack(struct.pack("<q", bytes_of(argument)), 1, 0)
    if isinstance(argument, float):
        return GIVEN.pack(struct.pack("<fi", argument, 0), 0, 0)
    return GIVEN.pack(struct.pack("<q", argument or 0), 0, 0)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes from the first element of a view to its last."""
    length = bytes_of(tensor) // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,)).view(torch.uint8)


def data(argument: Argument) -> bytes:
    return flat(argument).numpy().tobytes() if isinstance(argument, torch.Tensor) else b""


def take_back(written: memoryview, arguments: Sequence[Argument]) -> None:
    """Copies each tensor from the file, element by element: what lies between them may be another's."""
    start = 0
    for argument in arguments:
        if not isinstance(argument, torch.Tensor):
            continue
        end = start + bytes_of(argument)
        if argument.numel() > 0:
            result = torch.frombuffer(bytearray(written[start:end]), dtype=argument.dtype)
            if all(stride > 0 or size == 1 for size, stride in zip(argument.shape, argument.stride())):
                with torch.no_grad():  # an expanded tensor is none that a kernel writes
                    argument.copy_(result.as_strided(argument.shape, argument.stride()))
        start = end


def report(build: str, status: int, words: str) -> str:
    """The first lines of a report, from where it begins, without addresses that say nothing."""
    lines = words.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.search(r"(WARNING|ERROR): \w+Sanitizer", line)), 0)
    head = "\n".join(lines[begin : begin + REPORT_LINES])
    return f"{build}, status {status}:\n{head}"
