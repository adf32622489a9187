"""`attn new`: writes a plugin project, complete and working, into a folder of its own.

The template is such a project itself, in `attn_core/template`: its files are linted, typed and tested as they lie, and
three names in them are replaced. The project appears at once, by a rename, or not at all.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from ..errors import InputError
from ..registry import registry
from .console import console

TEMPLATE = Path(__file__).parents[1] / "template"
#: Folders that tools leave where they run; pip makes the first when it installs.
LEFT_BY_TOOLS = frozenset({"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".nox", "dist"})

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MAX_NAME = 50
ACCEPTED = f"small letters, digits and single hyphens, a letter first, {MAX_NAME} characters at most"


@dataclass(frozen=True)
class Names:
    """What a project is called, by whom."""

    distribution: str  #: by pip: "attn-hello"

    @property
    def package(self) -> str:
        """By `import`: "attn_hello"."""
        return self.distribution.replace("-", "_")

    @property
    def plugin(self) -> str:
        """By attn, as the prefix of its kernels: "hello"."""
        return self.distribution.removeprefix("attn-")


#: The names in the template, none of which is part of another word there.
PLACEHOLDERS = Names("attn-example-kernel")


@click.command()
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Folder in which the project's own is made; default: this one.",
)
def new(name: str, into: Path) -> None:
    """Write a plugin project that works at once: a kernel, its tests, and all that a package needs.

    NAME is what the distribution is called: small letters, digits and hyphens. The package has underscores instead, and
    the plugin is called the same without a leading attn-. Nothing that exists is overwritten.

    \b
    Examples:
        attn new attn-hello
        attn new my-kernel --into ~/src
    """
    names = checked(name)
    target = create(names, into)
    show = console()
    show.print(f"made {target}", soft_wrap=True)
    show.print(f"  plugin {names.plugin}, with the kernel {names.plugin}/attend, in src/{names.package}/attend.py")
    show.print("next, in that folder:")
    show.print('  python -m pip install -e ".[test]"')
    show.print("  pytest")
    show.print(f"  attn check {names.plugin}")


def checked(name: str) -> Names:
    """The names of a new project. Raises InputError for one that cannot be, or that is taken here."""
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:MAX_NAME].rstrip("-")
        hint = f"; {better!r} would do" if NAME.fullmatch(better) else ""
        raise InputError(f"new: a name is {ACCEPTED}; got {name!r}{hint}")
    names = Names(name)
    if keyword.iskeyword(names.package):
        raise InputError(f"new: {name!r} is a keyword of Python, and could not be imported; 'attn-{name}' would do")
    for plugin in registry.plugins():
        if plugin.name == names.plugin:
            whose = f"{plugin.distribution} {plugin.version}".strip() or plugin.entry_point
            raise InputError(f"new: {name!r} would be the plugin {names.plugin!r}, which {whose} is already")
    taken = _taken(names)
    if taken:
        raise InputError(f"new: {taken} is installed here already; choose another name than {name!r}")
    return names


def _taken(names: Names) -> str:
    """The distribution or module of that name in this environment; "" where there is none."""
    import importlib_metadata

    try:
        return f"distribution {importlib_metadata.distribution(names.distribution).metadata['Name']}"
    except importlib_metadata.PackageNotFoundError:
        found = importlib.util.find_spec(names.package)
        return "" if found is None else f"a module {names.package!r}"


def create(names: Names, into: Path) -> Path:
    """Writes the project into a folder of its own in `into`; the path of that.

    Raises InputError where something is there already, or nothing can be written; then nothing was.
    """
    target = into / names.distribution
    if not into.is_dir():
        raise InputError(f"new: --into: {into} is not a folder")
    if os.path.lexists(target) and not _is_empty_folder(target):
        raise InputError(f"new: {target} is there already, and nothing is overwritten; move it or give another --into")
    try:
        # Beside the target, and so on the same file system: a rename puts all of it there, or fails.
        with tempfile.TemporaryDirectory(prefix=f".{names.distribution}-", dir=into) as beside:
            made = Path(beside) / names.distribution
            for path, text in project(names).items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8", newline="\n")
            made.rename(target)
    except OSError as error:
        raise InputError(f"new: {target} cannot be made: {error.strerror}; nothing was written") from error
    return target


def project(names: Names) -> dict[str, str]:
    """The files of a project, by path."""
    files = {}
    for path in sorted(TEMPLATE.rglob("*")):
        relative = path.relative_to(TEMPLATE)
        if path.is_file() and not LEFT_BY_TOOLS.intersection(relative.parts):
            files[_renamed(relative.as_posix(), names)] = _renamed(path.read_text(encoding="utf-8"), names)
    return files


def _renamed(text: str, names: Names) -> str:
    """`text` with the names of this project; the longest first, as one holds another."""
    for field in ("distribution", "package", "plugin"):
        text = text.replace(getattr(PLACEHOLDERS, field), f"\0{field}\0")
    for field in ("distribution", "package", "plugin"):
        text = text.replace(f"\0{field}\0", getattr(names, field))
    return text


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
