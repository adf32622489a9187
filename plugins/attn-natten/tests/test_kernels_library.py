"""What is said of an installed NATTEN that is not there, is another one, or does not load; and when it is imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attn_core.errors import DeclarationError
from attn_natten import library

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import doubled, registry_of_the_plugin, write

CUDA = {f"natten/{family}-{kind}" for family in ("cutlass", "hopper", "blackwell") for kind in ("fna", "fmha")}
FLEX = {"natten/flex-fna", "natten/flex-fmha"}


def conditions():
    """The condition of each kernel of the plugin, by name."""
    registry = registry_of_the_plugin()
    return {kernel.name: registry.condition(kernel) for kernel in registry.kernels()}


def only(found):
    """The one condition that all have."""
    [condition] = {(each.state, each.reason, each.fix) for each in found.values()}
    return condition


def test_the_plugin_offers_the_kernels_of_both_families_of_natten():
    assert set(conditions()) == CUDA | FLEX


def test_without_natten_its_kernels_are_absent_with_the_line_to_type(monkeypatch):
    monkeypatch.setattr("attn_core.library.find_spec", lambda name: None)
    assert only(conditions()) == ("absent", "NATTEN is not installed", "pip install 'attn-natten[natten]'")


@pytest.mark.skipif(importlib.util.find_spec("natten") is not None, reason="NATTEN is installed")
def test_where_natten_is_really_not_installed_its_kernels_are_absent():
    code = """
from attn_natten.kernels import KERNELS
for kernel in KERNELS:
    print(kernel.probe().state)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["absent"] * len(CUDA | FLEX)


def test_a_natten_that_is_whole_is_ready(tmp_path):
    with doubled(tmp_path):
        assert {each.state for each in conditions().values()} == {"ready"}


@pytest.mark.parametrize("version", ["0.17.5", "0.20.1", "0.22.0", "0.22.0.dev1", "1.0"])
def test_another_generation_of_natten_is_named_with_the_range_and_never_imported(tmp_path, version):
    with doubled(tmp_path, version=version, source="raise RuntimeError('it was imported')"):
        state, reason, fix = only(conditions())
    assert state == "unavailable"
    assert f"natten {version} is installed" in reason
    assert ">=0.21,<0.22" in reason
    assert fix == "pip install 'attn-natten[natten]'"


def test_a_version_that_only_the_module_tells_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("attn_core.library.distributed", lambda distribution: None)
    with doubled(tmp_path, version="0.17.5", metadata=False):
        state, reason, _ = only(conditions())
    assert (state, "natten 0.17.5 is installed" in reason) == ("unavailable", True)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.7", "0.21.6+torch2110cu130", "0.21.8.dev1"])
def test_every_release_of_0_21_is_spoken_to(version):
    assert library.NATTEN.is_supported(version)


@pytest.mark.parametrize("version", ["0.20.1", "0.22.0", "0.22.0.dev1", "main", ""])
def test_no_other_version_is(version):
    assert not library.NATTEN.is_supported(version)


def test_without_libnatten_the_cuda_kernels_are_unavailable_and_flex_is_ready(tmp_path):
    with doubled(tmp_path, changes={"HAS_LIBNATTEN = True": "HAS_LIBNATTEN = False"}):
        found = conditions()
    assert {name for name, each in found.items() if each.state == "ready"} == FLEX
    state, reason, fix = only({name: found[name] for name in CUDA})
    assert (state, reason) == ("unavailable", "natten 0.21.7 is built without libnatten, its CUDA kernels")
    assert "NATTEN_CUDA_ARCH" in fix


def test_a_libnatten_that_does_not_load_tells_why_though_natten_hides_it(tmp_path):
    with doubled(tmp_path, changes={"HAS_LIBNATTEN = True": "HAS_LIBNATTEN = False"}):
        text = "raise ImportError('libnatten.so: undefined symbol: _ZN3c105ErrorC2E')"
        (tmp_path / "natten" / "libnatten.py").write_text(text, encoding="utf-8")
        found = conditions()
    assert {name for name, each in found.items() if each.state == "ready"} == FLEX
    state, reason, _ = only({name: found[name] for name in CUDA})
    assert state == "unavailable"
    assert "cannot be loaded" in reason
    assert f"torch {torch.__version__}" in reason
    assert "ImportError: libnatten.so: undefined symbol: _ZN3c105ErrorC2E" in reason


@pytest.mark.parametrize(
    "raised",
    [
        "OSError('libcudart.so.13: cannot open shared object file')",
        "RuntimeError('operator natten::na1d_forward does not exist')",
        "ImportError('cannot import name x')",
        "ModuleNotFoundError('No module named triton')",
        "SystemExit(1)",
    ],
    ids=lambda text: text.partition("(")[0],
)
def test_a_natten_whose_import_raises_is_broken_with_the_cause_and_tried_once(tmp_path, raised):
    tries = tmp_path / "tries"
    source = f"open({str(tries)!r}, 'a').write('+')\nraise {raised}"
    with doubled(tmp_path, source=source):
        state, reason, _ = only(conditions())
    assert state == "broken"
    assert "importing natten 0.21.7" in reason
    kind, _, text = raised.partition("(")
    assert f"{kind}: {text[:-1].strip(chr(39))}" in reason
    assert tries.read_text() == "+"


def test_after_a_new_installation_a_reloaded_registry_asks_again(tmp_path):
    registry = registry_of_the_plugin()
    with doubled(tmp_path, source="raise OSError('not yet')"):
        assert {registry.condition(kernel).state for kernel in registry.kernels()} == {"broken"}
        shutil.rmtree(tmp_path / "natten")
        write(tmp_path, metadata=False)
        registry.reload()
        assert {registry.condition(kernel).state for kernel in registry.kernels()} == {"ready"}


def test_a_kernel_whose_module_cannot_be_imported_when_it_is_chosen_says_so(tmp_path):
    registry = registry_of_the_plugin()
    with doubled(tmp_path, source="raise OSError('no such library')"):
        kernel = registry.kernel("natten/flex-fna")
        with pytest.raises(DeclarationError, match="OSError: no such library"):
            registry.run(kernel)


def test_listing_the_kernels_imports_no_natten(tmp_path):
    write(tmp_path, source="raise SystemExit('natten was imported')")
    asked = """
import sys
import attn_natten, attn_natten.plugin
names = [kernel.name for kernel in attn_natten.plugin.attn_kernels()]
assert len(names) == 8, names
assert not [name for name in sys.modules if name.partition(".")[0] == "natten"]
"""
    paths = [str(tmp_path), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
