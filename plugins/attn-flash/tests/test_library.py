"""What is said of an installed FlashAttention that is not there, is another one, or does not load; and when it is
imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attn_core.testing import fake_distribution

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_doubled import DOUBLE, LIBRARIES, VERSIONS, doubled, installed_from, registry_of_the_plugin

INSTALL = {
    "fa2": "pip install --no-build-isolation 'attn-flash[fa2]'",
    "fa3": "pip install --no-build-isolation"
    " 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    "fa4": "pip install 'attn-flash[fa4]'",
}
#: Where the module of each lies, for a text to be written there.
FILES = {
    "fa2": "flash_attn/flash_attn_interface.py",
    "fa3": "flash_attn_interface.py",
    "fa4": "flash_attn/cute/__init__.py",
}
BY_NAME = pytest.mark.parametrize("name", FILES)


def conditions():
    """The condition of each kernel of the plugin, by its name behind the slash."""
    registry = registry_of_the_plugin()
    return {kernel.name.partition("/")[2]: registry.condition(kernel) for kernel in registry.kernels()}


def write(folder, name, source, *, version=None):
    """Writes an installed library into `folder`, all of which is this text."""
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    if name == "fa2":
        (folder / "flash_attn" / "__init__.py").write_text("", encoding="utf-8")
    if version is not None:
        fake_distribution(folder, LIBRARIES[name].distribution, version, {}, {}, ())


def test_the_plugin_offers_one_kernel_per_generation():
    assert set(conditions()) == {"fa2", "fa3", "fa4"}


@BY_NAME
def test_without_its_library_a_kernel_is_absent_with_the_line_to_type(tmp_path, name):
    with installed_from(tmp_path):
        found = conditions()[name]
    assert (found.state, found.reason, found.fix) == (
        "absent",
        f"{LIBRARIES[name].name} is not installed",
        INSTALL[name],
    )


@BY_NAME
def test_a_library_that_is_whole_is_ready_and_the_others_stay_absent(tmp_path, name):
    with doubled(tmp_path, name):
        found = conditions()
    assert {each: condition.state for each, condition in found.items()} == {
        each: "ready" if each == name else "absent" for each in found
    }


def test_all_three_can_be_there_at_once(tmp_path):
    with doubled(tmp_path, *FILES):
        assert {condition.state for condition in conditions().values()} == {"ready"}


# Found by distribution and by module


def test_a_namespace_that_other_packages_share_is_no_flash_attention_2(tmp_path):
    (tmp_path / "flash_attn" / "ops").mkdir(parents=True)
    with installed_from(tmp_path):
        found = conditions()
    assert found["fa2"].state == "absent"
    assert "flash_attn is there (a namespace of other packages), without flash_attn.flash_attn_interface" in (
        found["fa2"].reason
    )
    assert found["fa4"].state == "absent"
    assert "without flash_attn.cute" in found["fa4"].reason


def test_where_flash_attention_4_alone_is_installed_flash_attention_2_is_absent(tmp_path):
    with doubled(tmp_path, "fa4"):
        found = conditions()
    assert (found["fa4"].state, found["fa2"].state) == ("ready", "absent")
    assert "a namespace of other packages" in found["fa2"].reason


def test_the_early_flash_attn_cute_that_flash_attn_brings_is_no_flash_attention_4(tmp_path):
    write(tmp_path, "fa4", "raise SystemExit('it was imported')")
    fake_distribution(tmp_path, "flash-attn", "2.8.3", {}, {}, ())
    with installed_from(tmp_path):
        found = conditions()["fa4"]
    assert (found.state, found.fix) == ("absent", INSTALL["fa4"])
    assert "this flash_attn.cute came without flash-attn-4" in found.reason


def test_flash_attention_3_by_the_name_that_flash_attn_2_has_today_is_found(tmp_path):
    fake_distribution(tmp_path, "flash-attn", "3.0.0b1", {}, {}, ())
    with doubled(tmp_path, "fa3", versions={"fa3": None}):
        assert conditions()["fa3"].state == "ready"


def test_flash_attention_3_lies_in_a_package_of_its_own_too(tmp_path):
    package = tmp_path / "flash_attn_3"
    package.mkdir()
    for empty in ("__init__.py", "_C.py"):
        (package / empty).write_text("")
    shutil.copy(DOUBLE / "fa3" / "flash_attn_interface.py", package)
    fake_distribution(tmp_path, "flash-attn-3", "3.0.0", {}, {}, ())
    with doubled(tmp_path):
        assert conditions()["fa3"].state == "ready"


@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_a_library_built_in_place_has_no_distribution_and_is_taken_by_what_it_can(tmp_path, name):
    with doubled(tmp_path, name, versions={name: None}):
        assert conditions()[name].state == "ready"


# Versions


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("fa2", "1.0.9"),
        ("fa2", "2.6.3"),
        ("fa2", "2.7.0rc1"),
        ("fa2", "3.0.0"),
        ("fa2", "3.0.0b1"),
        ("fa3", "2.9"),
        ("fa3", "4.0"),
        ("fa4", "4.0.0b12"),
        ("fa4", "5.0.0"),
        ("fa4", "0.0.0"),
    ],
    ids=lambda text: text,
)
def test_a_version_out_of_range_is_refused_with_the_range_and_never_imported(tmp_path, name, version):
    write(tmp_path, name, "raise RuntimeError('it was imported')", version=version)
    with installed_from(tmp_path):
        found = conditions()[name]
    distribution, supported = LIBRARIES[name].distribution, LIBRARIES[name].supported
    assert (found.state, found.fix) == ("unavailable", INSTALL[name])
    assert found.reason == f"{distribution} {version} is installed; this plugin speaks to {distribution}{supported}"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("fa2", "2.7.0"),
        ("fa2", "2.8.3"),
        ("fa2", "2.8.3.post2"),
        ("fa2", "2.8.3+cu12torch2.9cxx11abitrue"),
        ("fa3", "3.0.0b1"),
        ("fa3", "3.0.0"),
        ("fa4", "4.0.0b13"),
        ("fa4", "4.0.0b36"),
        ("fa4", "4.1"),
    ],
    ids=lambda text: text,
)
def test_versions_in_range_are_spoken_to(name, version):
    assert LIBRARIES[name].is_supported(version)


@BY_NAME
def test_a_text_that_is_no_version_is_none(name):
    assert not LIBRARIES[name].is_supported("main")


@BY_NAME
def test_a_library_whose_functions_are_others_says_which_is_missing(tmp_path, name):
    source = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False): ...\n"
    write(tmp_path, name, source, version=VERSIONS[name])
    with installed_from(tmp_path):
        found = conditions()[name]
    assert found.state == "unavailable"
    assert "is of another generation: it has no flash_attn_func(softcap, " in found.reason


# Libraries that do not load


@pytest.mark.parametrize(
    "raised",
    [
        "OSError('libcudart.so.12: cannot open shared object file')",
        "ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')",
        "RuntimeError('operator flash_attn_3::fwd does not exist')",
        "SystemExit(1)",
    ],
    ids=lambda text: text.partition("(")[0],
)
@BY_NAME
def test_a_library_whose_import_raises_is_broken_with_the_cause_and_tried_once(tmp_path, name, raised):
    tries = tmp_path / "tries"
    write(tmp_path, name, f"open({str(tries)!r}, 'a').write('+')\nraise {raised}", version=VERSIONS[name])
    with installed_from(tmp_path):
        found = conditions()[name]
    assert found.state == "broken"
    kind, _, text = raised.partition("(")
    assert f"importing {LIBRARIES[name].distribution} {VERSIONS[name]} beside torch {torch.__version__}" in found.reason
    assert f"{kind}: {text[:-1].strip(chr(39))}" in found.reason
    assert LIBRARIES[name].rebuild in found.reason
    assert tries.read_text() == "+"


@pytest.mark.parametrize(
    ("name", "module"),
    [("fa2", "flash_attn_2_cuda"), ("fa3", "flash_attn_3._C"), ("fa3", "flash_attn_3")],
    ids=lambda text: text,
)
def test_a_build_without_cuda_is_unavailable_and_the_fix_builds_it_anew(tmp_path, name, module):
    if module == "flash_attn_3._C":
        (tmp_path / "flash_attn_3").mkdir()
        (tmp_path / "flash_attn_3" / "__init__.py").write_text("")
    write(tmp_path, name, f"import {module}", version=VERSIONS[name])
    with installed_from(tmp_path):
        found = conditions()[name]
    told = f"{LIBRARIES[name].distribution} {VERSIONS[name]} has no {module}, its CUDA kernels"
    assert (found.state, found.reason, found.fix) == ("unavailable", told, LIBRARIES[name].rebuild)


@BY_NAME
def test_a_library_that_lacks_what_it_needs_names_it(tmp_path, name):
    write(tmp_path, name, "import a_package_that_nobody_has", version=VERSIONS[name])
    with installed_from(tmp_path):
        found = conditions()[name]
    told = f"{LIBRARIES[name].distribution} {VERSIONS[name]} needs a_package_that_nobody_has, which is not installed"
    assert (found.state, found.reason, found.fix) == ("absent", told, INSTALL[name])


@BY_NAME
def test_a_library_that_lacks_a_part_of_itself_is_broken(tmp_path, name):
    root = LIBRARIES[name].modules[0].partition(".")[0]
    write(tmp_path, name, f"import {root}.a_part_that_is_gone", version=VERSIONS[name])
    with installed_from(tmp_path):
        found = conditions()[name]
    assert found.state == "broken"
    assert "ModuleNotFoundError" in found.reason


def test_a_torch_for_rocm_is_another_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with doubled(tmp_path, "fa2"):
        found = conditions()["fa2"]
    assert (found.state, "built for ROCm" in found.reason) == ("unavailable", True)


# When it is imported


def test_after_a_new_installation_a_reloaded_registry_asks_again(tmp_path):
    registry = registry_of_the_plugin()
    write(tmp_path, "fa3", "raise OSError('not yet')", version="3.0.0")
    with installed_from(tmp_path):
        kernel = registry.kernel("flash/fa3")
        assert registry.condition(kernel).state == "broken"
        (tmp_path / FILES["fa3"]).unlink()
        with installed_from(tmp_path, DOUBLE, DOUBLE / "fa3"):
            registry.reload()
            assert registry.condition(kernel).state == "ready"


def test_listing_the_kernels_imports_no_library(tmp_path):
    for name in FILES:
        write(tmp_path, name, "raise SystemExit('a library was imported')", version=VERSIONS[name])
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('a library was imported')")
    asked = """
import sys
import attn_flash, attn_flash.plugin
names = [kernel.name for kernel in attn_flash.plugin.attn_kernels()]
assert names == ["flash/fa2", "flash/fa3", "flash/fa4"], names
assert not [name for name in sys.modules if name.startswith("flash_attn")]
"""
    paths = [str(tmp_path), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
