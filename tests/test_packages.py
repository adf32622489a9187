"""What a package of this repository is made of, and what its wheel carries."""

import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [path.parent for path in sorted([*ROOT.glob("core/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")])]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, zipfile.ZipFile]:
    """The wheel of each package, built from the sources as they are now."""
    built = {}
    for package in PACKAGES:
        folder = tmp_path_factory.mktemp(package.name)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(command, cwd=package, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        built[package] = zipfile.ZipFile(wheel)
    return built


def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(in_dist_info(wheel, "METADATA"))


def in_dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_the_core_is_among_the_packages():
    assert ROOT / "core" in PACKAGES


@each_package
@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"])
def test_a_package_has_its_documents(package, name):
    assert (package / name).read_text(encoding="utf-8").strip()


@each_package
def test_a_package_carries_the_licence_of_the_repository(package):
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_package
def test_a_wheel_holds_every_source_file_and_nothing_else(package, wheels):
    source = package / "src"
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    caches = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    written = {path.as_posix() for path in files if not caches.intersection(path.parts)}
    held = {name for name in wheels[package].namelist() if ".dist-info/" not in name}
    assert held == written


@each_package
def test_a_wheel_says_that_it_is_typed_and_under_which_licence(package, wheels):
    names = wheels[package].namelist()
    assert [name for name in names if name.count("/") == 1 and name.endswith("/py.typed")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert metadata(wheels[package])["License-Expression"] == "Apache-2.0"


@each_package
def test_metadata_is_complete(package, wheels):
    found = metadata(wheels[package])
    for field in ("Name", "Version", "Summary", "Requires-Python", "Keywords"):
        assert found[field], field
    assert found["Description-Content-Type"] == "text/markdown"
    assert str(found.get_payload()).strip() == (package / "README.md").read_text(encoding="utf-8").strip()
    assert {url.split(", ")[0] for url in found.get_all("Project-URL")} >= {"Homepage", "Issues", "Changelog"}
    classifiers = found.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: 3.10" in classifiers


@each_package
def test_the_changelog_begins_with_the_version_that_is_built(package, wheels):
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (package / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == metadata(wheels[package])["Version"]


def test_the_cores_wheel_offers_the_command_and_the_built_in_plugin(wheels):
    points = in_dist_info(wheels[ROOT / "core"], "entry_points.txt")
    assert "[console_scripts]\nattn = attn_core.cli:main" in points
    assert "[attn.plugins]\ntorch = attn_core.torch_kernels" in points


def test_the_core_depends_on_what_it_imports_and_no_kernel_library(wheels):
    needed = [
        re.match(r"[\w-]+", line)[0]
        for line in metadata(wheels[ROOT / "core"]).get_all("Requires-Dist")
        if "extra ==" not in line
    ]
    assert sorted(needed) == ["click", "importlib-metadata", "packaging", "pluggy", "rich", "torch"]
