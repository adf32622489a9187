"""The xFormers that tests speak to: the real one where it is installed, else the double; and installed ones made up."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import attn_core
import importlib_metadata
from attn_core.hookspecs import GROUP
from attn_core.registry import Registry
from attn_core.testing import fake_distribution, importable
from attn_xformers import library

DOUBLE = Path(__file__).with_name("double")
VERSION = "0.0.35"
IS_REAL = importlib.util.find_spec("xformers") is not None


@contextmanager
def xformers_here() -> Iterator[object]:
    """`xformers.ops.fmha`: of the real xFormers, or within it of the double, which leaves nothing behind."""
    if IS_REAL:
        library.XFORMERS.forget()
        yield import_module(library.XFORMERS.modules[0])
        return
    with importable(DOUBLE):
        library.XFORMERS.forget()
        try:
            yield import_module(library.XFORMERS.modules[0])
        finally:
            _remove()


@contextmanager
def installed(
    folder: Path, *, version: str = VERSION, metadata: bool = True, changes: dict[str, str] | None = None
) -> Iterator[Path]:
    """Within it, `import xformers` finds the double, with `changes`: a module's path, such as "ops/fmha/ck" -> all of
    its text."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "xformers"}
    package = folder / "xformers"
    shutil.copytree(DOUBLE / "xformers", package, ignore=shutil.ignore_patterns("__pycache__"))
    init = package / "__init__.py"
    init.write_text(init.read_text(encoding="utf-8").replace(f'"{VERSION}"', f'"{version}"'), encoding="utf-8")
    for path, text in (changes or {}).items():
        (package / f"{path}.py").write_text(text, encoding="utf-8")
    if metadata:
        fake_distribution(folder, "xformers", version, {}, {}, ())
    with importable(folder):
        library.XFORMERS.forget()
        try:
            yield folder
        finally:
            _remove()
            sys.modules.update(before)


def _remove() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]
    library.XFORMERS.forget()
    attn_core.refresh()  # what was found of it is not so any more


def registry_of_the_plugin() -> Registry:
    """A registry that finds this plugin and no other, whatever is installed."""
    return Registry(lambda: [importlib_metadata.EntryPoint("xformers", "attn_xformers.plugin", GROUP)])
