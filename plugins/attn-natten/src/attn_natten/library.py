"""Which NATTEN is installed, and whether its kernels can be there.

Forced by what an installed NATTEN can be: absent; of another generation, with other functions under the same name;
built without its CUDA library; built for another torch. The last raises anything at import, or is hidden: NATTEN takes
an extension that cannot be loaded for one that was not built. And importing it opens a CUDA context, so nothing here
does that before a kernel is weighed for the first time.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from attn_core import Unusable
from attn_core.errors import AttnError
from attn_core.tracing import constant

#: The releases of NATTEN that are spoken to, as specifiers of versions.
SUPPORTED = ">=0.21,<0.22"
INSTALL = "pip install 'attn-natten[natten]'"
#: NATTEN builds its CUDA library where a GPU is seen, or where it is told for which ones.
BUILD = f"NATTEN_CUDA_ARCH='8.0;9.0' pip install --force-reinstall --no-deps --no-build-isolation 'natten{SUPPORTED}'"


class BrokenLibraryError(AttnError, ImportError):
    """NATTEN is installed and cannot be imported."""


def unusable(*, libnatten: bool) -> Unusable | None:
    """Why no kernel of NATTEN can run here, or None; `libnatten`: one of those that it wrote in CUDA.

    Raises BrokenLibraryError where importing NATTEN raises.
    """
    if find_spec("natten") is None:
        return Unusable("absent", "NATTEN is not installed", INSTALL)
    known = metadata_version()
    if known is not None and not is_supported(known):
        return _other_version(known)
    module = natten()
    if not is_supported(installed()):
        return _other_version(installed())
    return _without_libnatten(module) if libnatten else None


def _other_version(found: str) -> Unusable:
    text = f"natten {found} is installed; this plugin speaks to natten{SUPPORTED}"
    return Unusable("unavailable", text, INSTALL)


def _without_libnatten(module: ModuleType) -> Unusable | None:
    if module.HAS_LIBNATTEN:
        return None
    if PathFinder.find_spec("natten.libnatten", list(module.__path__)) is None:
        return Unusable("unavailable", f"natten {installed()} is built without libnatten, its CUDA kernels", BUILD)
    try:
        import_module("natten.libnatten")
        reason = "no reason is given"
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
    text = f"the libnatten of natten {installed()} cannot be loaded beside torch {torch.__version__}: {reason}"
    return Unusable("unavailable", text, BUILD)


def natten() -> ModuleType:
    """NATTEN, imported at the first call. Raises BrokenLibraryError, with the cause, each time where that raises."""
    outcome = _import()
    if isinstance(outcome, ModuleType):
        return outcome
    raise BrokenLibraryError(
        f"importing natten {metadata_version() or '(of unknown version)'} beside torch {torch.__version__} raises"
        f" {type(outcome).__name__}: {outcome}"
    ) from outcome


@functools.cache
def _import() -> ModuleType | BaseException:
    try:
        return import_module("natten")
    except (Exception, SystemExit) as error:  # a library that was built for another torch raises anything
        return error


def metadata_version() -> str | None:
    """The version of the distribution, without importing it; None where the module has no distribution."""
    try:
        return version("natten")
    except PackageNotFoundError:
        return None


@functools.cache
def installed() -> str:
    """The version of the NATTEN that is imported."""
    return str(natten().__version__)


def is_supported(found: str) -> bool:
    """Whether that is a version that this plugin speaks to. A text that is no version is none."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(SUPPORTED).contains(found, prereleases=True)
    except InvalidVersion:
        return False


@constant
def is_at_least(wanted: str) -> bool:
    """Whether the installed NATTEN is of that version or newer."""
    from packaging.version import Version

    return Version(installed()) >= Version(wanted)


@constant
def takes(function: str, parameter: str) -> bool:
    """Whether a public function of the installed NATTEN has that parameter."""
    return parameter in inspect.signature(getattr(natten(), function)).parameters


@constant
def has_torch_ops() -> bool:
    """Whether NATTEN's CUDA kernels are ops of torch, which a graph can hold."""
    environment: Any = import_module("natten.utils.environment")
    return not getattr(environment, "DISABLE_TORCH_OPS", True)


def forget() -> None:
    """Looks again at the next call, as after an installation."""
    _import.cache_clear()
    installed.cache_clear()
