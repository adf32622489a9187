"""Whether a plugin was made for this core, read from its metadata before anything of it is imported."""

from __future__ import annotations

import functools
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

CORE = "attn-core"


@functools.cache
def core_version() -> str | None:
    """The installed version of the core; None in a source tree without metadata."""
    import importlib_metadata

    try:
        return importlib_metadata.version(CORE)
    except importlib_metadata.PackageNotFoundError:
        return None


def misfit(distribution: Any) -> tuple[str, str] | None:
    """(reason, what to type) where `distribution` asks for another version of the core; else None."""
    version = core_version()
    if distribution is None or version is None:
        return None
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"its metadata has an invalid requirement {text!r}: {error}", f"pip install -U {distribution.name}"
        if canonicalize_name(requirement.name) != CORE or (requirement.marker and not requirement.marker.evaluate()):
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            reason = f"{distribution.name} {distribution.version} needs {CORE}{requirement.specifier}, found {version}"
            return reason, f'pip install -U {distribution.name} "{CORE}{requirement.specifier}"'
    return None
