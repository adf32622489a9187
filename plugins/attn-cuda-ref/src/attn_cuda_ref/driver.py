"""The CUDA driver, by ctypes: load a cubin, launch its function. Every return code is checked.

A context belongs to the process that made it. One that forks afterwards has a copy that hangs or crashes at the first
call, so a child is told before it tries.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import CudaError, ForkError
from .launcher import Argument, Dim3

#: CUDA_ERROR_OUT_OF_MEMORY, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OUT_OF_MEMORY, MAX_DYNAMIC_SHARED = 2, 8
#: Bytes of dynamic shared memory that a function has without asking.
WITHOUT_ASKING = 48 << 10


@lru_cache(maxsize=1)
def driver() -> Driver:
    """The one of this machine. Raises CudaError where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"cuda-ref: the CUDA driver cannot be loaded: {error}") from error
    return Driver(library)


class Driver:
    """What of the driver's functions is used; `library` has them by name, as ctypes gives them."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._process = os.getpid()
        self._modules: list[Any] = []  # loaded until the process ends
        self._call("cuInit", 0)

    def enter(self, device: int) -> None:
        """Makes the context current that torch uses on this device, where the thread has none yet."""
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if not current.value:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(handle), device)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self._call("cuCtxSetCurrent", context)

    def load(self, cubin: bytes, entry: str) -> ctypes.c_void_p:
        """The function of a cubin, in the current context."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        self._modules.append(module)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(entry.encode()))
        return function

    def allow_shared_bytes(self, function: ctypes.c_void_p, count: int) -> None:
        """Lets a function have that much dynamic shared memory."""
        self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, count)

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: Dim3,
        block: Dim3,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Queues it in a stream of the current context."""
        slots = ctypes.create_string_buffer(packed(arguments))
        base = ctypes.addressof(slots)
        addresses = (ctypes.c_void_p * len(arguments))(*range(base, base + 8 * len(arguments), 8))
        self._call("cuLaunchKernel", function, *grid, *block, shared_bytes, ctypes.c_void_p(stream), addresses, None)

    def _call(self, name: str, *arguments: Any) -> None:
        if os.getpid() != self._process:
            raise ForkError(
                "cuda-ref: CUDA was started before this process was forked, and cannot be used in it; start workers by"
                ' the "spawn" method: multiprocessing.set_start_method("spawn")'
            )
        code = getattr(self._library, name)(*arguments)
        if code == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"cuda-ref: {name}: {self._told(code)}")
        if code:
            raise CudaError(f"cuda-ref: {name}: {self._told(code)}")

    def _told(self, code: int) -> str:
        """A code in the driver's words."""
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(name))
        self._library.cuGetErrorString(code, ctypes.byref(text))
        told = (name.value or b"unknown error").decode(), (text.value or b"no words for it").decode()
        return f"error {code}, {told[0]}: {told[1]}"


def packed(arguments: Sequence[Argument]) -> bytes:
    """Each in 8 bytes of its own: an address, an integer (of which an `int` takes the lower half), or a float."""
    codes, values = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            codes.append("Q")
            values.append(argument.data_ptr())
        elif isinstance(argument, float):
            codes.append("f4x")
            values.append(argument)  # type: ignore[arg-type]
        else:
            codes.append("q")
            values.append(argument or 0)
    return struct.pack("<" + "".join(codes), *values)
