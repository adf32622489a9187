"""What an entry is called with, laid out as C lays it out; and tensors described so that accesses can be judged."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from attn_cuda_ref.launcher import Argument, Dim3
from torch import Tensor

MOST_DIMS = 8
WARP, MOST_THREADS = 32, 1024
#: What a block may have at most on any GPU that the package knows (sm_90, sm_100).
MOST_SHARED_BYTES = 227 * 1024
INTEGERS = {"i": ctypes.c_int, "l": ctypes.c_longlong}
FLOATS = {"f": ctypes.c_float, "d": ctypes.c_double}
NAMES = {"p": "a pointer", "c": "a pointer", "i": "an int", "l": "a long long", "f": "a float", "d": "a double"}


class Parameter(ctypes.Structure):
    """runtime.h: of what kind, and of how many bytes, a parameter of an entry is."""

    _fields_ = (("code", ctypes.c_char), ("bytes", ctypes.c_int))


class Region(ctypes.Structure):
    """state.h: a tensor, by the bytes that are its elements; strides descending, joined where nothing lies between."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("argument", ctypes.c_int),
        ("item", ctypes.c_int),
        ("writable", ctypes.c_int),
        ("dims", ctypes.c_int),
        ("sizes", ctypes.c_int64 * MOST_DIMS),
        ("strides", ctypes.c_int64 * MOST_DIMS),
    )


class Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Launch(ctypes.Structure):
    """state.h: all that a launch is."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", Index),
        ("block", Index),
        ("shared_bytes", ctypes.c_uint64),
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("tensor_count", ctypes.c_int),
        ("schedule", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("patience", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_room", ctypes.c_uint64),
    )


def bytes_of(tensor: Tensor) -> int:
    """How many bytes lie from the first element to the end of the last, those between elements of a view included."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def pieces(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride in bytes) of each dimension that moves, widest stride first; neighbours without a gap joined."""
    item = tensor.element_size()
    moving = [(stride * item, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1 and stride > 0]
    joined: list[tuple[int, int]] = []
    for stride, size in sorted(moving):
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0] * size, joined[-1][1])
        else:
            joined.append((size, stride))
    return joined[::-1]


def region(number: int, tensor: Tensor, writable: bool) -> Region:
    """The description of argument `number`."""
    made = Region(tensor.data_ptr(), bytes_of(tensor), number, tensor.element_size(), writable)
    parts = pieces(tensor)
    if len(parts) > MOST_DIMS:
        raise ValueError(f"argument {number}: a tensor of {len(parts)} dimensions; the emulator knows {MOST_DIMS}")
    made.dims = len(parts)
    for i, (size, stride) in enumerate(parts):
        made.sizes[i], made.strides[i] = size, stride
    return made


def values(entry: str, codes: Sequence[str], arguments: Sequence[Argument]) -> list[ctypes._SimpleCData]:
    """Each argument as C has it; what does not fit the entry's parameters is an error that says which.

    The GPU's driver checks none of this.
    """
    if len(codes) != len(arguments):
        raise TypeError(f"{entry} takes {len(codes)} arguments, and {len(arguments)} are given")
    made: list[ctypes._SimpleCData] = []
    for i, (code, argument) in enumerate(zip(codes, arguments)):
        is_number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
        if code in "pc" and (argument is None or isinstance(argument, Tensor)):
            made.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        elif code in INTEGERS and is_number and isinstance(argument, int):
            value = INTEGERS[code](argument)
            if value.value != argument:
                raise TypeError(f"{entry}: argument {i} is {argument}, which {NAMES[code]} cannot hold")
            made.append(value)
        elif code in FLOATS and is_number:
            made.append(FLOATS[code](argument))
        else:
            wanted = NAMES.get(code, "of a type of its own")
            raise TypeError(f"{entry}: parameter {i} is {wanted}, and the argument is {type(argument).__name__}")
    return made


def check_launch(grid: Dim3, block: Dim3, shared_bytes: int) -> None:
    """Raises ValueError for what no GPU launches, and for blocks of broken warps, which no kernel here has."""
    threads = block[0] * block[1] * block[2]
    if threads < 1 or threads > MOST_THREADS or threads % WARP:
        raise ValueError(f"block={block}: a block has 32 to {MOST_THREADS} threads, in whole warps of {WARP}")
    if min(grid) < 0 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise ValueError(f"grid={grid}: a grid has fewer than 2**31 blocks along x, and 65535 at most along y and z")
    if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
        raise ValueError(f"shared_bytes={shared_bytes}: a block has 0 to {MOST_SHARED_BYTES}")
