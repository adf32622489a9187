"""Makes the packages of this source tree importable, with their metadata, where nothing can be installed.

Plugins are found by the metadata of what is installed; a source tree has none, so it is written into a folder that is
on the path only meanwhile. What the core needs and the machine lacks comes from wheels, unpacked beside it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
#: Module -> distribution: what the core imports on a call. torch is taken to be that of the machine.
NEEDED = {"pluggy": "pluggy", "importlib_metadata": "importlib-metadata", "packaging": "packaging"}


def packages() -> list[Path]:
    """The folders with a pyproject.toml: the core, then each plugin by name."""
    return [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]


def make_importable(folder: Path, wheels: Path | None) -> list[str]:
    """Puts the sources and the wheels' contents on `sys.path`, and the metadata that they need into `folder`.

    What is installed on the machine is shadowed by the sources, but not by the wheels.

    Returns the names of the wheels that were unpacked. Raises ValueError for a wheel that is none.
    """
    metadata, unpacked = folder / "metadata", folder / "wheels"
    metadata.mkdir()
    unpacked.mkdir()
    for package in packages():
        write_metadata(package, metadata)
    found = sorted(wheels.glob("*.whl")) if wheels is not None else []
    for wheel in found:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is no wheel: {error}") from error
    sys.path[:0] = [*(str(package / "src") for package in packages()), str(metadata)]
    sys.path.append(str(unpacked))
    return [wheel.name for wheel in found]


def write_metadata(package: Path, folder: Path) -> None:
    """Writes what an installed package says of itself: name, version, what it requires, and its entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{re.sub(r'[-_.]+', '_', project['name'])}-{project['version']}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project.get("dependencies", [])]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups = project.get("entry-points", {})
    text = "\n".join(
        line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    )
    (info / "entry_points.txt").write_text(text + "\n", encoding="utf-8")


def missing() -> list[str]:
    """The distributions that the core needs and that cannot be imported."""
    return [name for module, name in NEEDED.items() if find_spec(module) is None]
