"""What this package raises and warns, beside the errors of the core."""

from __future__ import annotations

from attn_core.errors import AttnError


class CudaError(AttnError, RuntimeError):
    """A call of the CUDA driver or of NVRTC that did not succeed; names the function, the code and what it means."""


class ForkError(CudaError):
    """CUDA was started in a process, which then forked; the child cannot use it."""


class CompileError(AttnError, RuntimeError):
    """A text that NVRTC does not compile; has the first lines of its log and the key of the cubin."""


class CacheWarning(UserWarning):
    """The folder of compiled kernels is not used, or not written to; said once for each reason."""
