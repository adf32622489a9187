"""Puts a double of NATTEN where `import natten` finds it, in place of what is installed, and takes it away again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import attn_core
import importlib_metadata
from attn_core import Capabilities, Kernel
from attn_core.hookspecs import GROUP
from attn_core.registry import Registry, registry
from attn_core.testing import fake_distribution, importable
from attn_natten import library
from attn_natten.kernels import KERNELS

DOUBLE = Path(__file__).with_name("double")
VERSION = "0.21.7"
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
#: Modules of ours that hold on to the NATTEN that was there when they were imported.
HOLDERS = ("attn_natten.kernels.run_fna", "attn_natten.kernels.run_fmha")


def write(
    folder: Path,
    *,
    version: str = VERSION,
    source: str | None = None,
    changes: dict[str, str] | None = None,
    metadata: bool = True,
) -> None:
    """Writes an installed NATTEN into `folder`: the double, with `changes` in its text, or `source` for all of it."""
    package = folder / "natten"
    if source is None:
        shutil.copytree(DOUBLE, package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / "__init__.py").read_text(encoding="utf-8")
        for old, new in ({f'"{VERSION}"': f'"{version}"'} | (changes or {})).items():
            assert old in text, f"the double has no {old!r}"
            text = text.replace(old, new)
    else:
        package.mkdir(parents=True)
        text = source
    (package / "__init__.py").write_text(text, encoding="utf-8")
    if metadata:
        fake_distribution(folder, "natten", version, {}, {}, ())


@contextmanager
def doubled(folder: Path, **written) -> Iterator[Path]:
    """Within it, `import natten` finds what `write` wrote into `folder`."""
    write(folder, **written)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_natten(name)}
    with importable(folder):
        library.NATTEN.forget()
        try:
            yield folder
        finally:
            for name in [name for name in sys.modules if is_natten(name)]:
                del sys.modules[name]
            sys.modules.update(before)
            library.NATTEN.forget()
            attn_core.refresh()  # what was found of the double is not so any more


def is_natten(name: str) -> bool:
    return name == "natten" or name.startswith("natten.") or name in HOLDERS


@contextmanager
def registered() -> Iterator[ModuleType]:
    """The double itself; within it every kernel is registered as `on_the_cpu` declares it."""
    for kernel in registry.kernels("natten/*"):
        registry.unregister(kernel)
    handles = [registry.register(on_the_cpu(kernel)) for kernel in BY_NAME.values()]
    try:
        yield library.NATTEN.module()
    finally:
        for handle in handles:
            handle.unregister()
        attn_core.refresh()  # finds those that are installed


def registry_of_the_plugin() -> Registry:
    """A registry that finds this plugin and no other, whatever is installed."""
    return Registry(lambda: [importlib_metadata.EntryPoint("natten", "attn_natten.plugin", GROUP)])


def on_the_cpu(kernel: Kernel) -> Kernel:
    """The kernel as it is declared for CUDA, declared for the CPU instead, where it is not anyway: the double runs
    there."""
    declared = next((each for each in kernel.declarations if "cpu" in each.devices), kernel.declarations[0])
    limits = {"min_compute_capability": None, "max_compute_capability": None}
    capabilities: Capabilities = replace(declared, devices={"cpu"}, **limits)
    return replace(kernel, capabilities=capabilities, costs={"cpu": kernel.costs["cuda"]} | kernel.costs)
