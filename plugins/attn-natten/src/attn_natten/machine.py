"""What this machine and the installed NATTEN can do, by the names that NATTEN 0.17 asked it with.

The `has_*` take a CUDA device, by default the current one, and never raise: without CUDA they are False. They speak of
kernels that this package would run, so those of GEMM, which NATTEN 0.20 dropped, are there only where somebody
registers such.
"""

from __future__ import annotations

import torch
from attn_core import is_available, kernels

from .errors import DeviceError

#: What `torch.cuda` takes.
Device = torch.device | str | int | None

#: Names of kernels of a kind.
FNA = ("natten/cutlass-fna", "natten/hopper-fna", "natten/blackwell-fna")
GEMM = ("natten/gemm*",)


def get_device_cc(device_index: Device = None) -> int:
    """The compute capability of a CUDA device as one number, 10 * major + minor; of the current one by default.

    Raises DeviceError, a RuntimeError, without CUDA, and for a device that is not there or none of CUDA's.
    """
    if not _sees_cuda():
        raise DeviceError(
            f"get_device_cc: takes a CUDA device, got device_index={device_index!r}, and torch {torch.__version__}"
            " sees none"
        )
    try:
        major, minor = torch.cuda.get_device_capability(device_index)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:  # which, depends on what is wrong
        raise DeviceError(
            f"get_device_cc: takes one of {torch.cuda.device_count()} CUDA devices, got device_index={device_index!r}"
        ) from error
    return 10 * major + minor


def has_cuda() -> bool:
    """Whether torch is built for CUDA and sees a device: the operations of this package run on it then."""
    return _sees_cuda()


def has_half(device_index: Device = None) -> bool:
    """Whether the device computes in float16: compute capability 5.0."""
    return _reaches(50, device_index)


def has_bfloat(device_index: Device = None) -> bool:
    """Whether the device computes in bfloat16: compute capability 8.0."""
    return _reaches(80, device_index)


def has_fna(device_index: Device = None) -> bool:
    """Whether an installed NATTEN has kernels of fused neighborhood attention, for compute capability 5.0."""
    return _reaches(50, device_index) and _ready(FNA)


def has_gemm(device_index: Device = None) -> bool:
    """Whether there are GEMM kernels of neighborhood attention, for compute capability 7.0."""
    return _reaches(70, device_index) and _ready(GEMM)


def has_tf32_gemm(device_index: Device = None) -> bool:
    """Whether there are GEMM kernels of neighborhood attention in float32, by TF32 or not: compute capability 8.0."""
    return _reaches(80, device_index) and _ready(GEMM)


def has_fp64_gemm(device_index: Device = None) -> bool:
    """Whether there are GEMM kernels of neighborhood attention in float64: compute capability 8.0."""
    return _reaches(80, device_index) and _ready(GEMM)


has_fused_na = has_fna
has_fp32_gemm = has_tf32_gemm


def _sees_cuda() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _reaches(capability: int, device: Device) -> bool:
    try:
        return get_device_cc(device) >= capability
    except DeviceError:
        return False


def _ready(patterns: tuple[str, ...]) -> bool:
    """Whether a kernel of such a name can run here. Loads the plugins."""
    return any(is_available(kernel.name) for pattern in patterns for kernel in kernels(pattern))


def __getattr__(name: str) -> bool:
    """HAS_LIBNATTEN: whether an installed NATTEN has its kernels in CUDA, whatever this machine has. Imports it."""
    if name != "HAS_LIBNATTEN":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from attn_core.errors import BrokenLibraryError

    from .library import unusable

    try:
        return unusable(libnatten=True) is None
    except BrokenLibraryError:
        return False
