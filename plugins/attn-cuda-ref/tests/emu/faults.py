"""What a kernel did that CUDA does not allow, in words: the runtime names code, addresses and arguments by numbers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from attn_cuda_ref.launcher import Argument

from .arguments import bytes_of
from .toolchain import HERE

#: How far from a tensor an address may lie and still be described by it.
NEAR = 1 << 20


class KernelError(RuntimeError):
    """A kernel did what CUDA does not allow; says what, in which block and thread, and in which line of its text."""


def explained(message: str, library: Path, arguments: Sequence[Argument]) -> str:
    """A message in which code is a line, and an address an element of an argument."""
    message = re.sub(r"<code\+(0x[0-9a-f]+)>", lambda found: line_of(library, found[1]), message)
    message = re.sub(r"<address (0x[0-9a-f]+)>", lambda found: nearest(int(found[1], 16), arguments), message)
    return re.sub(
        r"<argument (\d+) byte (\d+)>", lambda found: element(int(found[1]), int(found[2]), arguments), message
    )


def line_of(library: Path, offset: str) -> str:
    """File and line in the kernel's text; where code was put into other code, that of the call behind it."""
    command = ["addr2line", "-i", "-e", str(library), offset]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return f"offset {offset} of {library.name}"
    places = [Path(line.split(" (")[0]) for line in found]
    names = [place.name for place in places if place.parent != HERE] or [places[0].name]
    return names[0] if len(names) == 1 else f"{names[0]} (called at {', '.join(names[1:])})"


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
