"""Doubles of the CUDA driver and of NVRTC: what ctypes would call, recorded, with codes that a test sets."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

OUT_OF_MEMORY, INVALID_IMAGE = 2, 200
NAMES = {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY", INVALID_IMAGE: b"CUDA_ERROR_INVALID_IMAGE"}


class Launch(NamedTuple):
    function: int | None
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int | None
    slots: list[bytes]  #: eight bytes for each argument


class DoubledDriver:
    """libcuda, with no device behind it. `codes`: function -> the code that it returns."""

    def __init__(self, codes: dict[str, int] | None = None, arguments: int = 0) -> None:
        self.codes = codes or {}
        self.arguments = arguments  #: of the function that is launched
        self.called: list[str] = []
        self.loaded: list[bytes] = []
        self.shared_bytes_allowed: list[int] = []
        self.launches: list[Launch] = []
        self.context = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            code = self.codes.get(name, 0)
            if not code and hasattr(self, f"_{name}"):
                getattr(self, f"_{name}")(*arguments)
            return code

        if not name.startswith("cu"):
            raise AttributeError(name)
        return call

    def _cuCtxGetCurrent(self, context: Any) -> None:  # noqa: N802
        context._obj.value = self.context

    def _cuCtxSetCurrent(self, context: Any) -> None:  # noqa: N802
        self.context = context.value

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:  # noqa: N802
        context._obj.value = 0xC0

    def _cuModuleLoadData(self, module: Any, image: Any) -> None:  # noqa: N802
        self.loaded.append(image.value)
        module._obj.value = len(self.loaded)

    def _cuModuleGetFunction(self, function: Any, module: Any, name: Any) -> None:  # noqa: N802
        function._obj.value = 100 + module.value

    def _cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> None:  # noqa: N802
        assert attribute == 8
        self.shared_bytes_allowed.append(value)

    def _cuLaunchKernel(self, function: Any, *rest: Any) -> None:  # noqa: N802
        *sizes, shared_bytes, stream, addresses, _ = rest
        slots = [ctypes.string_at(addresses[i], 8) for i in range(self.arguments)]
        grid, block = tuple(sizes[:3]), tuple(sizes[3:])
        self.launches.append(Launch(function.value, grid, block, shared_bytes, stream.value, slots))

    def _cuGetErrorName(self, code: int, name: Any) -> None:  # noqa: N802
        name._obj.value = NAMES.get(code)

    def _cuGetErrorString(self, code: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"what the driver says of it" if code in NAMES else None


class DoubledNvrtc:
    """libnvrtc: "compiles" a text to itself, unless `log` is given, which it then fails with."""

    def __init__(self, log: str | None = None, architectures: tuple[int, ...] = (75, 80, 90, 100)) -> None:
        self.log = log
        self.known = architectures
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.sources: list[str] = []
        self.options: tuple[str, ...] = ()
        self.destroyed = 0
        self.nvrtcGetErrorString = lambda code: b"NVRTC_ERROR_COMPILATION" if code == 6 else b"NVRTC_ERROR"

        def version(major: Any, minor: Any) -> int:
            major._obj.value, minor._obj.value = 13, 0
            return 0

        self.nvrtcVersion = version

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "nvrtcGetErrorString":  # whose result type is set, as that of a function of ctypes
            value = _Settable(value)
        super().__setattr__(name, value)

    def nvrtcGetNumSupportedArchs(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.known)
        return 0

    def nvrtcGetSupportedArchs(self, found: Any) -> int:  # noqa: N802
        found[:] = self.known
        return 0

    def nvrtcCreateProgram(self, program: Any, source: Any, name: Any, *headers: Any) -> int:  # noqa: N802
        self.sources.append(source.value.decode())
        program._obj.value = len(self.sources)
        return 0

    def nvrtcCompileProgram(self, program: Any, count: int, options: Any) -> int:  # noqa: N802
        self.options = tuple(option.decode() for option in options)
        self.compiled.append((self.sources[program.value - 1], self.options))
        return 6 if self.log is not None else 0

    def nvrtcGetProgramLogSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = len((self.log or "").encode()) + 1
        return 0

    def nvrtcGetProgramLog(self, program: Any, content: Any) -> int:  # noqa: N802
        content.value = (self.log or "").encode()
        return 0

    def nvrtcGetCUBINSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = len(self._cubin(program))
        return 0

    def nvrtcGetCUBIN(self, program: Any, content: Any) -> int:  # noqa: N802
        content.raw = self._cubin(program)
        return 0

    def nvrtcDestroyProgram(self, program: Any) -> int:  # noqa: N802
        self.destroyed += 1
        return 0

    def _cubin(self, program: Any) -> bytes:
        return b"\x7fELF" + self.sources[program.value - 1].encode()


class _Settable:
    def __init__(self, function: Any) -> None:
        self._function = function
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def as_int(slot: bytes) -> int:
    return int(struct.unpack("<q", slot)[0])


def as_float(slot: bytes) -> float:
    return float(struct.unpack("<f", slot[:4])[0])
