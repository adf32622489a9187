"""What a kernel's probe may ask of the machine.

Probes run before the first call on a device of the kernel's, and wherever somebody asks what there is, and must leave
the process as it is. torch.cuda.is_available() does not: it starts CUDA's driver, after which no process that is forked
may use CUDA.
torch.cuda.device_count() asks NVML, which starts nothing, and the driver only where there is no NVML.
"""

from __future__ import annotations

import torch

from .kernel import Unusable


def no_cuda() -> Unusable | None:
    """Why nothing can run on CUDA (or ROCm) here: torch is built without it, or sees no device. None where it can.

    For `Kernel.probe`; a process that has asked may fork, and its children may use CUDA.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return Unusable("unavailable", "this torch is built without CUDA")
    if torch.cuda.device_count() == 0:
        return Unusable("unavailable", "torch sees no CUDA device here")
    return None
