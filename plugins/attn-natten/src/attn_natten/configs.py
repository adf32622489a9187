"""The tile shapes that NATTEN's kernels take for a tensor, by NATTEN's own finders.

They are NATTEN's knowledge of its kernels, so each asks the installed NATTEN, with the arguments that it takes there,
and raises MissingLibraryError where there is none. Kernels of attn choose their tiles by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import library
from .errors import MissingLibraryError

FINDERS = (
    "get_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fna",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_configs_for_flex_fna",
    "get_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_flex_fmha",
)


def __getattr__(name: str) -> Any:
    if name not in FINDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _finder(name)


def _finder(name: str) -> Callable[..., Any]:
    def find(*arguments: Any, **named: Any) -> Any:
        why_not = library.unusable(libnatten=False)
        if why_not is not None:
            raise MissingLibraryError(f"{name}: asks NATTEN about its kernels; {why_not.reason}: {why_not.fix}")
        return getattr(library.NATTEN.module(), name)(*arguments, **named)

    find.__name__ = find.__qualname__ = name
    find.__doc__ = f"NATTEN's `{name}`, with its arguments. Raises MissingLibraryError without NATTEN."
    return find


def __dir__() -> list[str]:
    return [*globals(), *FINDERS]
