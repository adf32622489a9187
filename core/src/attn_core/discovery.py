"""Finds the entry points of installed plugins.

What lies in site-packages is not under our control: one distribution's unreadable entry_points.txt makes
importlib_metadata raise for all of them, and one without metadata has no name. Neither may hide the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .hookspecs import GROUP

CORE = "attn-core"
BUILT_IN = "torch"
BUILT_IN_MODULE = "attn_core.torch_kernels"


@dataclass(frozen=True)
class UnreadableEntryPoints:
    """Stands for the plugins of a distribution whose entry_points.txt cannot be read; to load it raises why."""

    name: str
    value: str
    error: Exception
    dist: None = None

    def load(self) -> None:
        raise self.error


def installed_entry_points() -> list[Any]:
    """Entry points of group `attn.plugins`, the built-in among them."""
    import importlib_metadata  # only once something asks for kernels

    try:
        found: list[Any] = list(importlib_metadata.entry_points(group=GROUP))
    except Exception:
        found = _one_by_one(importlib_metadata.distributions())
    if not any(e.value == BUILT_IN_MODULE for e in found):  # run from a source tree, without metadata
        found.append(importlib_metadata.EntryPoint(BUILT_IN, BUILT_IN_MODULE, GROUP))
    return found


def owner(entry_point: Any) -> tuple[str, str]:
    """(name, version) of the distribution that an entry point belongs to; "" where that is unknown."""
    if entry_point.dist is None:
        return "", ""
    try:
        metadata = entry_point.dist.metadata  # read and parsed anew each time
        return metadata["Name"], metadata["Version"]
    except Exception:  # the reason is told when the plugin's requirements are read
        return _name(entry_point.dist), ""


def _one_by_one(distributions: Any) -> list[Any]:
    found: list[Any] = []
    seen: set[str] = set()
    for distribution in distributions:
        name = _name(distribution)
        if name in seen:  # the first on the path hides the later ones
            continue
        seen.add(name)
        try:
            found += distribution.entry_points.select(group=GROUP)
        except Exception as error:
            if GROUP in (distribution.read_text("entry_points.txt") or ""):
                found.append(UnreadableEntryPoints(name, "entry_points.txt", error))
    return found


def _name(distribution: Any) -> str:
    try:
        return str(distribution.name)
    except Exception:  # its metadata is missing or unreadable, but its folder is named after it
        path = getattr(distribution, "_path", None)
        return path.name.partition("-")[0] if path is not None else "a distribution without a name"
