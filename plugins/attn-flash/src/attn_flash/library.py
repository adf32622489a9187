"""Which FlashAttention is installed, and whether its kernels can be there.

Forced by what an installation can be:
- Three libraries share two names. `flash_attn` is FlashAttention-2, or just the folder that FlashAttention-4 lies in
  (`flash_attn.cute`): a namespace, which imports without an error and offers nothing. A release of FlashAttention-2 may
  bring an early `flash_attn.cute` of its own. FlashAttention-3 is `flash_attn_interface`, and once had the distribution
  name of FlashAttention-2. So a library is found by its distribution and by its module, both.
- Each is compiled for one torch. Built for another, importing it raises ImportError or OSError (an undefined symbol, a
  missing libcudart); built without CUDA, its extension is missing.
- Importing one takes seconds and may open a CUDA context, so that happens when its kernel is first weighed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from types import ModuleType

import torch
from attn_core import Unusable
from attn_core.errors import AttnError
from attn_core.tracing import constant


class BrokenLibraryError(AttnError, ImportError):
    """A library is installed and cannot be imported."""


@dataclass(frozen=True)
class Library:
    """One generation of FlashAttention, and how it is found."""

    name: str
    distribution: str
    supported: str  #: the releases that are spoken to, as specifiers of versions
    modules: tuple[str, ...]  #: the first that is there has the functions
    extension: tuple[str, ...]  #: what its CUDA kernels are in
    needs: Mapping[str, tuple[str, ...]]  #: function -> parameters without which it is another generation
    install: str  #: the line to type
    rebuild: str  #: the line to type where it does not fit this torch, or has no CUDA kernels
    told_by_distribution: bool = True  #: that its module is there without its distribution says nothing
    borrowed: str = ""  #: another distribution that had this library in it, at such versions alone

    def __hash__(self) -> int:
        return hash(self.name)


FA2 = Library(
    name="FlashAttention-2",
    distribution="flash-attn",
    supported=">=2.7,<3",
    modules=("flash_attn.flash_attn_interface",),
    extension=("flash_attn_2_cuda",),
    needs={
        "flash_attn_func": ("softcap", "alibi_slopes", "deterministic", "return_attn_probs"),
        "flash_attn_varlen_func": ("softcap", "alibi_slopes", "deterministic", "return_attn_probs"),
        "flash_attn_with_kvcache": ("softcap", "block_table", "cache_seqlens", "return_softmax_lse"),
    },
    install="pip install --no-build-isolation 'attn-flash[fa2]'",
    rebuild="pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir 'flash-attn>=2.7,<3'",
    told_by_distribution=False,
)
FA3 = Library(
    name="FlashAttention-3",
    distribution="flash-attn-3",
    supported=">=3.0.0b1,<4",
    modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    extension=("flash_attn_3", "flash_attn_3._C", "flash_attn_3_cuda"),
    needs={
        "flash_attn_func": ("softcap", "deterministic"),
        "flash_attn_varlen_func": ("softcap", "deterministic", "seqused_k"),
        "flash_attn_with_kvcache": ("softcap", "page_table", "cache_seqlens", "return_softmax_lse"),
    },
    install="pip install --no-build-isolation"
    " 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    rebuild="pip install --force-reinstall --no-deps --no-build-isolation"
    " 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    told_by_distribution=False,
    borrowed="flash-attn",
)
FA4 = Library(
    name="FlashAttention-4",
    distribution="flash-attn-4",
    supported=">=4.0.0b13,<5",  # before, a backward that is to be bit-equal counts its blocks wrongly
    modules=("flash_attn.cute",),
    extension=(),
    needs={
        "flash_attn_func": ("softcap", "deterministic", "return_lse"),
        "flash_attn_varlen_func": ("softcap", "deterministic", "return_lse", "seqused_k", "page_table"),
    },
    install="pip install 'attn-flash[fa4]'",
    rebuild="pip install --force-reinstall --no-deps 'flash-attn-4>=4.0.0b13,<5'",
)


def unusable(library: Library) -> Unusable | None:
    """Why no kernel of `library` can run here, or None. Raises BrokenLibraryError where importing it raises."""
    if located(library) is None:
        return Unusable("absent", _told_absent(library), library.install)
    known = installed(library)
    if known is None and library.told_by_distribution:
        text = f"{library.name} is not installed: this {library.modules[0]} came without {library.distribution}"
        return Unusable("absent", text, library.install)
    if known is not None and not is_supported(library, known):
        text = f"{library.distribution} {known} is installed; this plugin speaks to {library.distribution}"
        return Unusable("unavailable", f"{text}{library.supported}", library.install)
    if torch.version.hip is not None:
        return Unusable("unavailable", f"{library.name} is spoken to on NVIDIA's GPUs; this torch is built for ROCm")
    outcome = _import(library)
    if isinstance(outcome, ModuleNotFoundError) and outcome.name is not None:
        if outcome.name in library.extension:
            text = f"{_named(library)} has no {outcome.name}, its CUDA kernels"
            return Unusable("unavailable", text, library.rebuild)
        if outcome.name.partition(".")[0] != library.modules[0].partition(".")[0]:
            text = f"{_named(library)} needs {outcome.name}, which is not installed"
            return Unusable("absent", text, library.install)
    return _lacking(library, module(library))


def _told_absent(library: Library) -> str:
    root, _, rest = library.modules[0].partition(".")
    spec = find_spec(root) if rest else None
    if spec is None:
        return f"{library.name} is not installed"
    kind = "a namespace of other packages" if spec.origin is None else spec.origin
    return f"{library.name} is not installed: {root} is there ({kind}), without {library.modules[0]}"


def _lacking(library: Library, found: ModuleType) -> Unusable | None:
    for function, parameters in library.needs.items():
        missing = [name for name in parameters if not takes(library, function, name)]
        if missing:
            what = f"{function}({', '.join(missing)})" if hasattr(found, function) else function
            text = f"{_named(library)} is of another generation: it has no {what}"
            return Unusable("unavailable", text, library.install)
    return None


def located(library: Library) -> str | None:
    """The name of its module, where there is one. Nothing is imported."""
    return next((name for name in library.modules if _spec_of(name) is not None), None)


def _spec_of(name: str) -> ModuleSpec | None:
    """The specification of a module that has a file; of a part of a package without importing the package."""
    root, *parts = name.split(".")
    spec = find_spec(root)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return None if spec is None or spec.origin is None else spec


def module(library: Library) -> ModuleType:
    """The module, imported at the first call. Raises BrokenLibraryError, with the cause, where that raises."""
    outcome = _import(library)
    if isinstance(outcome, ModuleType):
        return outcome
    raise BrokenLibraryError(
        f"importing {_named(library)} beside torch {torch.__version__} raises {type(outcome).__name__}: {outcome};"
        f" where it was built for another torch: {library.rebuild}"
    ) from outcome


@functools.cache
def _import(library: Library) -> ModuleType | BaseException:
    name = located(library)
    if name is None:
        return ModuleNotFoundError(_told_absent(library))
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:  # a library that was built for another torch raises anything
        return error


def installed(library: Library) -> str | None:
    """The version of its distribution, which need not have one: built in place, it is just a module."""
    found = _version_of(library.distribution)
    if found is None and library.borrowed:
        borrowed = _version_of(library.borrowed)
        return borrowed if borrowed is not None and is_supported(library, borrowed) else None
    return found


def _version_of(distribution: str) -> str | None:
    try:
        return version_of(distribution)
    except PackageNotFoundError:
        return None


def _named(library: Library) -> str:
    known = installed(library)
    return f"{library.distribution} {known}" if known is not None else f"{library.name} (of unknown version)"


def is_supported(library: Library, found: str) -> bool:
    """Whether that is a version that this plugin speaks to. A text that is no version is none."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(library.supported).contains(found, prereleases=True)
    except InvalidVersion:
        return False


@constant
def is_older(library: Library, than: str) -> bool:
    """Whether its version is known, and older."""
    from packaging.version import Version

    known = installed(library)
    return known is not None and Version(known) < Version(than)


@constant
def takes(library: Library, function: str, parameter: str) -> bool:
    """Whether a function of the installed library is there, and has that parameter."""
    found = getattr(module(library), function, None)
    return found is not None and parameter in inspect.signature(found).parameters


def forget() -> None:
    """Looks again at the next call, as after an installation."""
    _import.cache_clear()
