"""A library that a plugin takes its kernels from: whether it is here, which one it is, and its import, late and once.

What an installed library can be forces this: absent; of another release, with other functions under the same names;
just a folder that other packages share; built for another torch, whereupon importing it raises anything; in want of
another package. And importing it takes seconds and may open a CUDA context, so nothing here does that before a kernel
is weighed for the first time. Plugins alone import this module.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from types import ModuleType
from weakref import WeakKeyDictionary

import torch

from .errors import BrokenLibraryError
from .kernel import Unusable
from .tracing import constant

#: What importing each has come to.
_outcomes: WeakKeyDictionary[Library, ModuleType | BaseException] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """One library, and how it is found.

    `unusable` is for the probe of a kernel, `module` for what runs it; nothing is imported before one is called.
    """

    name: str  #: as its people write it: "FlashAttention-2"
    distribution: str  #: "flash-attn"
    supported: str  #: the releases that the plugin speaks to, as specifiers of versions: ">=2.7,<3"
    modules: tuple[str, ...]  #: the first that is there has the functions: ("flash_attn.flash_attn_interface",)
    install: str  #: the line to type where it is absent
    rebuild: str = ""  #: the line to type where it does not fit this torch
    version_in: str = ""  #: a module of it whose `__version__` is believed rather than the distribution's
    told_by_distribution: bool = False  #: that its module is there without its distribution says nothing

    def unusable(self) -> Unusable | None:
        """Why nothing of it can run here, or None. Raises BrokenLibraryError where importing it raises."""
        found = self.unfit()
        if found is not None:
            return found
        failure = self.failure()
        if isinstance(failure, ModuleNotFoundError) and failure.name is not None and self.lacks_another(failure):
            return Unusable("absent", f"{self} needs {failure.name}, which is not installed", self.install)
        self.module()
        known = self.installed()
        return self._of_another_release(known) if known is not None and not self.is_supported(known) else None

    def unfit(self) -> Unusable | None:
        """Why it is not even tried: it is not here, or in another release. Nothing is imported."""
        if self.located() is None:
            return Unusable("absent", self._told_absent(), self.install)
        known = self.distributed()
        if known is None and self.told_by_distribution:
            text = f"{self.name} is not installed: this {self.modules[0]} came without {self.distribution}"
            return Unusable("absent", text, self.install)
        return self._of_another_release(known) if known is not None and not self.is_supported(known) else None

    def located(self) -> str | None:
        """The name of its module, where there is one. Nothing is imported."""
        return next((name for name in self.modules if _spec_of(name) is not None), None)

    def module(self) -> ModuleType:
        """The module, imported at the first call. Raises BrokenLibraryError, with the cause, each time where that
        raises."""
        outcome = self._imported()
        if isinstance(outcome, ModuleType):
            return outcome
        advice = self.advice(outcome)
        raise BrokenLibraryError(
            f"importing {self} beside torch {torch.__version__} raises {type(outcome).__name__}: {outcome}"
            f"{f'; {advice}' if advice else ''}"
        ) from outcome

    def failure(self) -> BaseException | None:
        """What importing it raises, or None."""
        outcome = self._imported()
        return None if isinstance(outcome, ModuleType) else outcome

    def advice(self, failure: BaseException) -> str:
        """What to do about what importing it raised; empty where nobody knows."""
        return f"where it was built for another torch: {self.rebuild}" if self.rebuild else ""

    def lacks_another(self, missing: ModuleNotFoundError) -> bool:
        """Whether the module that importing it did not find is another package's, to be installed beside it."""
        root = (missing.name or "").partition(".")[0]
        return all(root != name.partition(".")[0] for name in self.modules)

    def is_imported(self) -> bool:
        """Whether `unusable` or `module` has imported it."""
        return isinstance(_outcomes.get(self), ModuleType)

    @constant
    def installed(self) -> str | None:
        """Its version; None where it has no distribution and its module, imported or not yet, does not say it."""
        if self.version_in and self.is_imported():
            return str(import_module(self.version_in).__version__)
        return self.distributed()

    def distributed(self) -> str | None:
        """The version of its distribution, which need not have one: built in place, a library is just a module."""
        return distributed(self.distribution)

    def is_supported(self, version: str) -> bool:
        """Whether the plugin speaks to that version. A text that is no version is none."""
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion

        try:
            return SpecifierSet(self.supported).contains(version, prereleases=True)
        except InvalidVersion:
            return False

    @constant
    def is_older(self, than: str) -> bool:
        """Whether its version is known, and older."""
        from packaging.version import Version

        known = self.installed()
        return known is not None and Version(known) < Version(than)

    @constant
    def takes(self, function: str, parameter: str) -> bool:
        """Whether a function of the module is there, and has that parameter."""
        found = getattr(self.module(), function, None)
        return found is not None and parameter in inspect.signature(found).parameters

    def forget(self) -> None:
        """Looks again at the next call, as after an installation."""
        _outcomes.pop(self, None)

    def __str__(self) -> str:
        """What errors call it: its distribution and version."""
        known = self.installed()
        return f"{self.distribution} {known}" if known is not None else f"{self.name} (of unknown version)"

    def _imported(self) -> ModuleType | BaseException:
        if self not in _outcomes:
            name = self.located()
            if name is None:
                return ModuleNotFoundError(self._told_absent())
            try:
                _outcomes[self] = import_module(name)
            except (Exception, SystemExit) as error:  # a library that was built for another torch raises anything
                _outcomes[self] = error
        return _outcomes[self]

    def _of_another_release(self, version: str) -> Unusable:
        text = f"{self.distribution} {version} is installed; this plugin speaks to {self.distribution}{self.supported}"
        return Unusable("unavailable", text, self.install)

    def _told_absent(self) -> str:
        root, _, rest = self.modules[0].partition(".")
        spec = find_spec(root) if rest else None
        if spec is None:
            return f"{self.name} is not installed"
        kind = "a namespace of other packages" if spec.origin is None else spec.origin
        return f"{self.name} is not installed: {root} is there ({kind}), without {self.modules[0]}"


def distributed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version_of(distribution)
    except PackageNotFoundError:
        return None


def _spec_of(name: str) -> ModuleSpec | None:
    """The specification of a module that has a file; of a part of a package without importing the package."""
    root, *parts = name.split(".")
    spec = find_spec(root)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return None if spec is None or spec.origin is None else spec
