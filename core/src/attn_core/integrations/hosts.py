"""The libraries whose attention attn can run, and `enable` and `disable` for several at once.

An integration is a module of this package with `TESTED` (the versions of its library that are tested),
`enable(*, prefer, strict)`, `disable()` and `is_enabled()`. It is imported when it is enabled.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from packaging.specifiers import SpecifierSet

from ..errors import InputError, IntegrationWarning, suggestion
from .missing import MissingPackageError


@dataclass(frozen=True)
class Host:
    """A library whose attention attn can run.

    Args:
        name: what `enable` calls it.
        package: the distribution that has it.
        module: our module for it, with its full name.
    """

    name: str
    package: str
    module: str

    @property
    def integration(self) -> ModuleType:
        """Our module for it, imported."""
        return import_module(self.module)

    @property
    def tested(self) -> str:
        """The versions that are tested, such as ">=5.23,<6"."""
        return str(self.integration.TESTED)

    @property
    def enabled(self) -> bool:
        return self.module in sys.modules and bool(self.integration.is_enabled())


HOSTS = {
    name: Host(name, name, f"attn_core.integrations.{name}") for name in ("torch", "timm", "transformers", "diffusers")
}

#: (host, version) of which it was said that they are not tested.
_said: set[tuple[str, str]] = set()


def enable(*hosts: str, prefer: Collection[str] | str = (), strict: bool = False) -> None:
    """See `attn_core.enable`."""
    if not hosts:
        raise InputError(f"enable: takes one or more of {', '.join(HOSTS)}; got none")
    chosen = [host_named(name, "enable") for name in hosts]
    for host in chosen:
        check_version(host, stacklevel=4)
    ours: list[Host] = []
    try:
        for host in chosen:
            was_enabled = host.enabled
            host.integration.enable(prefer=(prefer,) if isinstance(prefer, str) else tuple(prefer), strict=strict)
            if not was_enabled:
                ours.append(host)
    except BaseException:
        for host in reversed(ours):
            host.integration.disable()
        raise


def disable(*hosts: str) -> None:
    """See `attn_core.disable`."""
    chosen = [host_named(name, "disable") for name in hosts] or list(HOSTS.values())
    for host in reversed(chosen):
        if host.enabled:
            host.integration.disable()


def host_named(name: str, who: str) -> Host:
    """The host of that name. Raises InputError where there is none; `who` asks."""
    host = HOSTS.get(name)
    if host is None:
        raise InputError(f"{who}: no integration {name!r}.{suggestion(name, HOSTS)} There are: {', '.join(HOSTS)}")
    return host


def check_version(host: Host, stacklevel: int = 3) -> None:
    """Warns, once for each version, where the installed one is outside of what is tested.

    Raises MissingPackageError where it is not installed. `stacklevel`: whom the warning is for, 2 being the caller.
    """
    import importlib_metadata

    try:
        version = importlib_metadata.version(host.package)
    except importlib_metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f'enable: {host.name} is not installed.\nTo install it: pip install "{host.package}{host.tested}"'
        ) from error
    if SpecifierSet(host.tested).contains(version, prereleases=True) or (host.name, version) in _said:
        return
    _said.add((host.name, version))
    warnings.warn(
        f"{host.name} {version} is outside of the versions that attn is tested with, {host.tested}: compare a result"
        f" with {host.name}'s own before you rely on it",
        IntegrationWarning,
        stacklevel=stacklevel,
    )


def enable_as_told(names: tuple[str, ...]) -> None:
    """What ATTN_ENABLE says. One warning for each that cannot be: an import of attn_core never fails for it."""
    for name in names:
        try:
            enable(name)
        except Exception as error:  # whatever the library raises when it is imported
            warnings.warn(f"ATTN_ENABLE: {name} was not enabled: {error}", IntegrationWarning, stacklevel=3)
