"""CUDA C++ to a cubin, by NVRTC: the compiler that comes with every CUDA torch, as a library. It needs no GPU.

A cubin for the very architecture, not PTX: what a newer NVRTC writes as PTX an older driver does not read, and a device
that is new needs nothing prepared, since it is compiled for where it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import CompileError, CudaError
from .launcher import TEXT, Constants

#: Lines of a log that an error quotes.
LINES = 12
#: nvrtcResult: NVRTC_ERROR_COMPILATION
FAILED = 6

OPTIONS = ("--std=c++17",)
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def architecture(capability: tuple[int, int]) -> str:
    """Of a compute capability; from 9.0 on with what that architecture has alone."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass(frozen=True)
class Asked:
    """All that a cubin depends on."""

    source: str
    entry: str
    headers: tuple[tuple[str, str], ...]  #: name, text
    options: tuple[str, ...]
    key: str  #: of all of these, the compiler's version and this package's

    @classmethod
    def of(cls, source: str, entry: str, constants: Constants, arch: str, version: tuple[int, int]) -> Asked:
        defined = tuple(f"-D{name}={value}" for name, value in sorted(constants.items()))
        options = (f"--gpu-architecture={arch}", *OPTIONS, *defined)
        headers = tuple(sorted(_headers(source).items()))
        parts = [__version__, f"nvrtc {version[0]}.{version[1]}", entry, *options, source]
        parts += [text for header in headers for text in header]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return cls(source, entry, headers, options, key)


def _headers(source: str) -> dict[str, str]:
    """What a text includes, directly or not."""
    found: dict[str, str] = {}
    to_read = INCLUDE.findall(source)
    while to_read:
        name = to_read.pop()
        if name not in found:
            found[name] = (TEXT / name).read_text(encoding="utf-8")
            to_read += INCLUDE.findall(found[name])
    return found


class Nvrtc:
    """The compiler; `library` has its functions by name, as ctypes gives them."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value

    def architectures(self) -> frozenset[int]:
        """Those that it compiles for, as 10 * major + minor."""
        count = ctypes.c_int()
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", found)
        return frozenset(found)

    def compile(self, asked: Asked) -> bytes:
        """The cubin. Raises CompileError with the log's first lines and the key."""
        program = ctypes.c_void_p()
        names = _strings([name for name, _ in asked.headers])
        texts = _strings([text for _, text in asked.headers])
        file = f"{asked.entry}.cu".encode()
        source = ctypes.c_char_p(asked.source.encode())
        self._check(
            "nvrtcCreateProgram", ctypes.byref(program), source, ctypes.c_char_p(file), len(names), texts, names
        )
        try:
            options = _strings(list(asked.options))
            code = self._library.nvrtcCompileProgram(program, len(options), options)
            if code:
                self._fail(code, program, asked)
            return self._read("nvrtcGetCUBIN", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _fail(self, code: int, program: ctypes.c_void_p, asked: Asked) -> None:
        what = f"cuda-ref: NVRTC {self.version[0]}.{self.version[1]} does not compile {asked.entry}"
        lines = self._read("nvrtcGetProgramLog", program).decode(errors="replace").strip("\0\n").splitlines()
        quoted = "".join(f"\n  {line}" for line in lines[:LINES])
        more = f"\n  ... {len(lines) - LINES} lines more" if len(lines) > LINES else ""
        reason = "" if code == FAILED else f" ({self._told(code)})"
        options = " ".join(option for option in asked.options if option not in OPTIONS)
        raise CompileError(f"{what}{reason}, key {asked.key}\n  with {options}{quoted}{more}")

    def _read(self, name: str, program: ctypes.c_void_p) -> bytes:
        """What `name` gives, of the size that `name`Size gives."""
        size = ctypes.c_size_t()
        self._check(f"{name}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._check(name, program, content)
        return content.raw

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"cuda-ref: {name}: {self._told(code)}")

    def _told(self, code: int) -> str:
        return f"error {code}, {(self._library.nvrtcGetErrorString(code) or b'unknown').decode()}"


def _strings(values: list[str]) -> Any:
    return (ctypes.c_char_p * len(values))(*[value.encode() for value in values])


@lru_cache(maxsize=1)
def nvrtc() -> Nvrtc:
    """The one of this machine. Raises CudaError where there is none."""
    tried = []
    for path in _candidates():
        try:
            return Nvrtc(_loaded(path))
        except OSError as error:
            tried.append(f"{path}: {error}")
    raise CudaError(
        f"cuda-ref: NVRTC cannot be loaded ({'; '.join(tried)}). It comes with torch for CUDA, or as the package"
        " nvidia-cuda-nvrtc; one that lies elsewhere is found where LD_LIBRARY_PATH names its folder"
    )


def _loaded(path: str) -> ctypes.CDLL:
    # NVRTC looks for its built-in functions by the loader alone, which does not search the folder that it lies in.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if os.sep in path else ():
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def _candidates() -> Iterator[str]:
    """Files that may be NVRTC: those of packages that come with torch, and those that the loader finds."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(path) for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    major = (torch.version.cuda or "13").partition(".")[0]
    of_torch = f"libnvrtc.so.{major}"
    yield from sorted(found, key=lambda path: (not path.endswith(of_torch), path))
    yield from dict.fromkeys((of_torch, "libnvrtc.so.13", "libnvrtc.so.12"))
