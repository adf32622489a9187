"""Everything this package raises or warns, beside what the core raises.

NATTEN's users catch RuntimeError for a constraint that is not met (0.17), or ValueError (0.20 and later): the classes
here are both, and AttnError too.
"""

from __future__ import annotations

from attn_core.errors import AttnError, InputError


class ConstraintError(InputError, RuntimeError):
    """Operands or parameters that neighborhood attention cannot take: a ValueError and a RuntimeError."""


class UnsupportedError(AttnError, NotImplementedError):
    """A legal combination that is not implemented, such as a relative positional bias beside a causal axis.

    A NotImplementedError, and so a RuntimeError.
    """


class UnknownBackendError(InputError, NotImplementedError):
    """A `backend=` that nobody knows; NATTEN raises NotImplementedError for it."""


class NonDeterministicError(AttnError, RuntimeError):
    """Something whose results may differ from run to run was asked for in the deterministic mode of this package."""


class DeviceError(AttnError, RuntimeError):
    """A CUDA device was asked about that is not there."""


class MissingLibraryError(AttnError, ImportError):
    """Only an installed NATTEN could answer."""


class NoEffectWarning(UserWarning):
    """A switch or an argument that changes nothing here; said once for each."""
