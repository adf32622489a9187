"""The kit that holds a kernel to what it declares, and to what every kernel must keep.

    from attn_core.conformance import check_kernel
    for result in check_kernel("hello/sdpa"):
        print(result)

Nothing has to be listed by a kernel's author: the problems are derived from its declaration.
"""

from .checks import CHECKS, Check
from .results import CheckFailed, CheckResult, NotTestable
from .run import check_kernel

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailed",
    "CheckResult",
    "NotTestable",
    "check_kernel",
    "parametrize_kernel_checks",
]


def __getattr__(name: str) -> object:
    """`parametrize_kernel_checks` needs pytest, which nothing else here does."""
    if name == "parametrize_kernel_checks":
        from .parametrize import parametrize_kernel_checks

        return parametrize_kernel_checks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
