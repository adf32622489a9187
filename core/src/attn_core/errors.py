"""Everything the core raises or warns.

Each error derives from AttnError and from the built-in type that fits, so that `except ValueError` works for
people who do not know this library, and `except AttnError` for those who do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AttnError(Exception):
    """Base of every error of attn."""


class InputError(AttnError, ValueError):
    """A call whose tensors or options do not fit together."""


class InputTypeError(AttnError, TypeError):
    """A call with an object of a kind that attention does not take."""


class UnboundBiasError(AttnError, ValueError):
    """A bias that does not know its lengths yet was asked for something that depends on them."""


class DeclarationError(AttnError, TypeError):
    """A kernel or plugin that declares something it cannot be."""


class DuplicateKernelError(AttnError, ValueError):
    """Two kernels under one name."""


class UnknownKernelError(AttnError, ValueError):
    """A kernel name that nobody registered."""


class NoKernelError(AttnError, RuntimeError):
    """No kernel takes this problem; the message has every kernel's reasons."""


class KernelRefusedError(NoKernelError):
    """The kernel that the caller insists on cannot take this problem; the message has all its reasons."""


class PlanError(AttnError, ValueError):
    """A plan was called with operands other than those it was made for."""


class BrokenLibraryError(AttnError, ImportError):
    """A library that a plugin takes its kernels from is installed, and cannot be imported."""


class CalibrationWarning(UserWarning):
    """A file of measured constants is ignored; estimates are by those that are shipped."""


class IntegrationWarning(UserWarning):
    """An integration did not do all that was asked of it, or is used with a version that it was not tested with."""


class PluginWarning(UserWarning):
    """A plugin was left out; said once per plugin, the rest go on."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'a', 'b'?"`, or nothing where no known name is near."""
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""
