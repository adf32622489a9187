"""The launcher of a GPU: compiled by NVRTC for the device at hand, kept on disk, run by the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from . import compiler
from .cache import Cache, default_folder
from .driver import WITHOUT_ASKING, Driver, driver
from .errors import CudaError
from .launcher import Argument, Constants, Dim3


class GpuFunction:
    """A function in the context of one device."""

    def __init__(self, of: Driver, handle: ctypes.c_void_p, device: int) -> None:
        self._driver = of
        self._handle = handle
        self._device = device
        self._allowed = WITHOUT_ASKING

    def launch(self, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        if 0 in grid:
            return
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.get_device() != self._device:
                raise CudaError(f"cuda-ref: takes tensors on cuda:{self._device}, got one on {argument.device}")
        with torch.cuda.device(self._device):
            self._driver.enter(self._device)
            if shared_bytes > self._allowed:
                self._driver.allow_shared_bytes(self._handle, shared_bytes)
                self._allowed = shared_bytes
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._driver.launch(self._handle, grid, block, shared_bytes, stream, arguments)


class GpuLauncher:
    """Of one device, which has this compute capability."""

    def __init__(self, device: int, capability: tuple[int, int], cache: Cache, of: Driver | None = None) -> None:
        self._device = device
        self._architecture = compiler.architecture(capability)
        self._cache = cache
        self._driver = of or driver()
        self._lock = Lock()

    def compile(self, source: str, entry: str, constants: Constants) -> GpuFunction:
        with self._lock:  # the same kernel, asked for by two threads, is compiled once
            cubin = self.cubin(source, entry, constants)
            with torch.cuda.device(self._device):
                self._driver.enter(self._device)
                return GpuFunction(self._driver, self._driver.load(cubin, entry), self._device)

    def cubin(self, source: str, entry: str, constants: Constants) -> bytes:
        """The compiled text, from disk where it is there."""
        asked = compiler.Asked.of(source, entry, constants, self._architecture, compiler.nvrtc().version)
        cubin = self._cache.get(asked.key)
        if cubin is None:
            cubin = compiler.nvrtc().compile(asked)
            self._cache.put(asked.key, cubin)
        return cubin


@cache
def launcher(device: int) -> GpuLauncher:
    """The one of `cuda:<device>`."""
    return GpuLauncher(device, torch.cuda.get_device_capability(device), Cache(default_folder()))
