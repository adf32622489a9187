"""Which xFormers is installed, and why its operators cannot be used where they cannot.

Forced by what an installed xFormers can be: absent; another release; built for another torch, which it hides behind a
log line; or broken by a neighbour, as where `import xformers.ops` raises because the extension of an installed
flash-attn is missing. Importing it takes seconds, so nothing here does that before one of its operators is weighed.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from attn_core import Unusable
from attn_core.errors import AttnError

#: The releases of xFormers that are spoken to, as specifiers of versions.
SUPPORTED = ">=0.0.35,<0.0.36"
INSTALL = "pip install 'attn-xformers[xformers]'"
MSLK = "pip install mslk"
#: All operators are reached through here; where their classes live (newer releases take them from mslk) does not count.
FMHA = "xformers.ops.fmha"
#: Distributions that xFormers imports where it finds them, and which take it down where they are broken.
NEIGHBOURS = {"flash_attn": "flash-attn", "flash_attn_3": "flash-attn-3", "fbgemm_gpu": "fbgemm-gpu", "mslk": "mslk"}


class BrokenLibraryError(AttnError, ImportError):
    """xFormers is installed and cannot be imported."""


def unusable() -> Unusable | None:
    """Why no operator of xFormers can run here, or None. Raises BrokenLibraryError where importing it raises."""
    if find_spec("xformers") is None:
        return Unusable("absent", "xFormers is not installed", INSTALL)
    known = metadata_version()
    if known is not None and not is_supported(known):
        return _other_version(known)
    operators = fmha()
    found = installed()
    if not is_supported(found):
        return _other_version(found)
    if not hasattr(operators, "Inputs"):  # it hides that what it takes its operators from is missing
        return Unusable("absent", f"xformers {found} takes its operators from mslk, which is not installed", MSLK)
    return None


def _other_version(found: str) -> Unusable:
    text = f"xformers {found} is installed; this plugin speaks to xformers{SUPPORTED}"
    return Unusable("unavailable", text, INSTALL)


def without_cuda(operator: Any) -> Unusable | None:
    """Why an operator for CUDA cannot run on this machine, or None. Those of mslk need no extension of xFormers."""
    build: Any = import_module("xformers._cpp_lib")
    is_own = operator.__module__.partition(".")[0] == "xformers"
    if is_own and not build._built_with_cuda and torch.version.hip is None:
        cause = build._cpp_library_load_exception
        said = f": {_in_one_line(cause)}" if cause is not None else ""
        text = f"the extension of xformers {installed()} cannot be loaded beside torch {torch.__version__}{said}"
        return Unusable("unavailable", text, f"{INSTALL}, beside a torch that it was built for")
    if not torch.cuda.is_available():
        return Unusable("unavailable", "there is no CUDA device here")
    return None


def _in_one_line(error: BaseException) -> str:
    """Also of what caused it: xFormers raises its own error from that of the loader."""
    cause = error.__cause__
    lines = [*str(error).splitlines()[:2], *([f"({type(cause).__name__}: {cause})"] if cause is not None else [])]
    return " ".join(" ".join(lines).split())


def fmha() -> ModuleType:
    """`xformers.ops.fmha`, imported at the first call. Raises BrokenLibraryError, with the cause, each time where that
    raises."""
    outcome = _import()
    if isinstance(outcome, ModuleType):
        return outcome
    raise BrokenLibraryError(
        f"importing xformers {metadata_version() or '(of unknown version)'} beside torch {torch.__version__} raises"
        f" {type(outcome).__name__}: {outcome}{_whose_fault(outcome)}"
    ) from outcome


def _whose_fault(error: BaseException) -> str:
    """Which neighbour's modules the error went through last, and what to do about it; empty where it is xFormers' own.

    A missing extension is a ModuleNotFoundError in the neighbour's own module, or names its file.
    """
    traceback = error.__traceback__
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if module in NEIGHBOURS:
            name = NEIGHBOURS[module]
            return f"; {name} is installed and broken, and xFormers imports it: reinstall it, or `pip uninstall {name}`"
        traceback = traceback.tb_next
    return ""


@functools.cache
def _import() -> ModuleType | BaseException:
    try:
        return import_module(FMHA)
    except (Exception, SystemExit) as error:  # a library that was built for another torch raises anything
        return error


def is_imported() -> bool:
    """Whether it has been imported by an operator's being weighed."""
    return bool(_import.cache_info().currsize) and isinstance(_import(), ModuleType)


def attn_bias() -> Any:
    """The module of xFormers' bias classes."""
    return fmha().attn_bias


def metadata_version() -> str | None:
    """The version of the distribution, without importing it; None where the module has no distribution."""
    try:
        return version("xformers")
    except PackageNotFoundError:
        return None


def installed() -> str:
    """The version of the xFormers that is imported."""
    return str(import_module("xformers").__version__)


def is_supported(found: str) -> bool:
    """Whether that is a version that this plugin speaks to. A text that is no version is none."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(SUPPORTED).contains(found, prereleases=True)
    except InvalidVersion:
        return False


def forget() -> None:
    """Looks again at the next call, as after an installation."""
    _import.cache_clear()
