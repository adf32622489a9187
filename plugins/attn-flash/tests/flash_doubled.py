"""Puts doubles of FlashAttention where its libraries are looked for, in place of whatever is installed.

`double/fa2`, `double/fa3` and `double/fa4` hold a package each as their libraries lay it; what they share lies beside
them. They run on the CPU, so the kernels are declared there as they are declared for CUDA.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, distributions
from pathlib import Path

import attn_core
import importlib_metadata
import pytest
from attn_core import Kernel
from attn_core.hookspecs import GROUP
from attn_core.registry import Registry, registry
from attn_core.testing import fake_distribution, importable
from attn_flash import library
from attn_flash.kernels import KERNELS

DOUBLE = Path(__file__).with_name("double")
BY_NAME = {kernel.name.partition("/")[2]: kernel for kernel in KERNELS}
LIBRARIES = {"fa2": library.FA2, "fa3": library.FA3, "fa4": library.FA4}
VERSIONS = {"fa2": "2.8.3", "fa3": "3.0.0", "fa4": "4.0.0b36"}
#: Names by which the libraries, and what their doubles are made of, are imported.
ROOTS = ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn_3", "flash_double")


@contextmanager
def doubled(folder: Path, *names: str, versions: dict[str, str | None] | None = None) -> Iterator[None]:
    """Within it, these libraries are installed, in `folder`: their doubles, and distributions; no others of the three.

    `versions`: of the distributions; None: without one.
    """
    for name in names:
        shutil.copytree(DOUBLE / name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        version = {**VERSIONS, **(versions or {})}[name]
        if version is not None:
            fake_distribution(folder, LIBRARIES[name].distribution, version, {}, {}, ())
    with installed_from(folder, DOUBLE):
        yield


@contextmanager
def installed_from(*folders: Path) -> Iterator[None]:
    """Within it, what lies in these folders is all that is installed of the three, wherever else they are."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_flash(name)}
    places = [str(folder) for folder in folders]

    def version_of(distribution: str) -> str:
        found = next(iter(distributions(name=distribution, path=places)), None)
        if found is None:
            raise PackageNotFoundError(distribution)
        return found.version

    try:
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.setattr("attn_core.library.find_spec", lambda name: PathFinder.find_spec(name, places))
            patch.setattr("attn_core.library.version_of", version_of)
            patch.setattr(sys, "meta_path", [OnlyFrom(places), *sys.meta_path])
            for folder in folders:
                stack.enter_context(importable(folder))
            library.forget()
            yield
    finally:
        for name in [name for name in sys.modules if is_of_flash(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        library.forget()
        attn_core.refresh()  # what was found of the double is not so any more


class OnlyFrom:
    """Finds the libraries in these folders, and nowhere else: a real `flash_attn` would hide the namespace of FA4."""

    def __init__(self, places: list[str]) -> None:
        self.places = places

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ROOTS:
            return None
        spec = PathFinder.find_spec(name, self.places if path is None else path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


def is_of_flash(name: str) -> bool:
    return name.partition(".")[0] in ROOTS or name.startswith("attn_flash.kernels.run_")


@contextmanager
def registered(*names: str) -> Iterator[None]:
    """Within it these kernels are registered as `on_the_cpu` declares them, and the others as they are."""
    for kernel in registry.kernels("flash/*"):
        registry.unregister(kernel)
    handles = [registry.register(on_the_cpu(each) if name in names else each) for name, each in BY_NAME.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.unregister()
        attn_core.refresh()  # finds those that are installed


def registry_of_the_plugin() -> Registry:
    """A registry that finds this plugin and no other, whatever is installed."""
    return Registry(lambda: [importlib_metadata.EntryPoint("flash", "attn_flash.plugin", GROUP)])


def on_the_cpu(kernel: Kernel) -> Kernel:
    """The kernel as it is declared for the first of its CUDA devices, declared for the CPU instead."""
    limits = {"min_compute_capability": None, "max_compute_capability": None}
    declared = replace(kernel.declarations[0], devices={"cpu"}, **limits)
    return replace(kernel, capabilities=declared, costs={"cpu": kernel.costs["cuda"]})
