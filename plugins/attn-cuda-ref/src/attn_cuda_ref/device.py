"""Whether this machine can run CUDA kernels, and for which devices they can be compiled. Starts no CUDA context."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attn_core import Problem, Refusal, no_cuda
from attn_core.kernel import Unusable

from .errors import CudaError


def probe() -> Unusable | None:
    """None where torch sees a CUDA device and NVRTC can be loaded."""
    if torch.version.cuda is None:
        of = "ROCm" if torch.version.hip else "CPUs"
        return Unusable("unavailable", f"torch {torch.__version__} is built for {of}, not for CUDA")
    missing = no_cuda()
    if missing is not None:
        return missing
    from . import compiler  # loads a library of a hundred megabytes, so only where there is a device

    try:
        compiler.nvrtc()
    except CudaError as error:
        return Unusable("unavailable", str(error), "pip install nvidia-cuda-nvrtc")
    return None


def refusals(problem: Problem) -> Iterator[Refusal]:
    """Of a device that the compiler does not know."""
    if not problem.is_cuda or problem.compute_capability is None:
        return
    from . import compiler

    major, minor = problem.compute_capability
    compiler_of = compiler.nvrtc()
    known = compiler_of.architectures()
    if 10 * major + minor not in known:
        version = ".".join(map(str, compiler_of.version))
        text = f"NVRTC {version} compiles for sm_{min(known)} to sm_{max(known)}, got sm_{major}{minor}"
        yield Refusal("compute_capability", text)
