"""What NATTEN calls its backends, and the kernels of attn that they are."""

from __future__ import annotations

from typing import Any

from attn_core.errors import InputTypeError, suggestion

from .errors import UnknownBackendError

#: Of neighborhood attention, and of plain attention.
FNA = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")
FMHA = ("cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha")


def kernel_of(backend: Any, accepted: tuple[str, ...]) -> str | None:
    """The name of the kernel to insist on: `natten/<backend>`; of a kernel of attn, the name itself; None for None.

    Raises UnknownBackendError for another name, InputTypeError for what is no name.
    """
    if backend is None:
        return None
    if not isinstance(backend, str):
        raise InputTypeError(f"backend: takes a name or None, got {type(backend).__name__}")
    if backend in accepted:
        return f"natten/{backend}"
    if "/" in backend:  # the core says whether there is such a kernel
        return backend
    names = ", ".join(map(repr, accepted))
    raise UnknownBackendError(
        f"backend: takes {names}, the name of a kernel of attn such as 'torch/tiled', or None for the best one;"
        f" got {backend!r}.{suggestion(backend, accepted)}"
    )
