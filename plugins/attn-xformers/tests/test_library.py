"""What is said of an installed xFormers that is absent, another release, or broken; and when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attn_xformers import library
from attn_xformers.kernels import KERNELS

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from xformers_here import IS_REAL, installed, registry_of_the_plugin

NAMES = {
    f"xformers/{name}"
    for name in (
        "cutlass",
        "cutlass-blackwell",
        "flash",
        "flash3",
        "flash3-splitkv",
        "triton-splitk",
        "ck",
        "ck-splitk",
    )
}
#: A module that a release may have, for one of the double that has none of its own extension.
LOADED = "_cpp_library_load_exception = None\n_built_with_cuda = True\n"
BUILT = "\nfor operator in (FwOp, BwOp):\n    operator.OPERATOR = len\n"


def conditions():
    """The condition of each kernel of the plugin, by name."""
    registry = registry_of_the_plugin()
    return {kernel.name: registry.condition(kernel) for kernel in registry.kernels()}


def only(found):
    """The one condition that all have."""
    [condition] = {(each.state, each.reason, each.fix) for each in found.values()}
    return condition


def source_of(module):
    """What the double has there."""
    path = Path(__file__).with_name("double") / "xformers" / f"{module}.py"
    return path.read_text(encoding="utf-8")


#: One whose CUTLASS operators are there.
WITH_CUTLASS = {"_cpp_lib": LOADED, "ops/fmha/cutlass": source_of("ops/fmha/cutlass") + BUILT}


def test_the_plugin_offers_a_kernel_for_each_operator():
    assert set(conditions()) == NAMES == {kernel.name for kernel in KERNELS}


def test_without_xformers_its_kernels_are_absent_with_the_line_to_type(monkeypatch):
    monkeypatch.setattr("attn_core.library.find_spec", lambda name: None)
    assert only(conditions()) == ("absent", "xFormers is not installed", "pip install 'attn-xformers[xformers]'")


@pytest.mark.skipif(IS_REAL, reason="xFormers is installed")
def test_where_xformers_is_really_not_installed_its_kernels_are_absent():
    assert {each.state for each in conditions().values()} == {"absent"}


@pytest.mark.parametrize("version", ["0.0.20", "0.0.34", "0.0.36", "0.0.36.dev1", "1.0"])
def test_another_release_is_named_with_the_range_and_never_imported(tmp_path, version):
    with installed(tmp_path, version=version, changes={"ops/__init__": "raise RuntimeError('it was imported')"}):
        state, reason, fix = only(conditions())
    assert state == "unavailable"
    assert reason == f"xformers {version} is installed; this plugin speaks to xformers>=0.0.35,<0.0.36"
    assert fix == "pip install 'attn-xformers[xformers]'"


def test_a_version_that_only_the_module_tells_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("attn_core.library.distributed", lambda distribution: None)
    with installed(tmp_path, version="0.0.34", metadata=False):
        state, reason, _ = only(conditions())
    assert (state, "xformers 0.0.34 is installed" in reason) == ("unavailable", True)


@pytest.mark.parametrize("version", ["0.0.35", "0.0.35.post1", "0.0.35+cu130", "0.0.35.dev1"])
def test_what_is_known_of_one_release_holds_for_its_builds(version):
    assert library.XFORMERS.is_supported(version) == (version != "0.0.35.dev1")


@pytest.mark.parametrize("version", ["main", "", "0.0.36+ca6d2aa"])
def test_what_is_no_such_version_is_not(version):
    assert not library.XFORMERS.is_supported(version)


@pytest.mark.parametrize(
    "raised",
    [
        "OSError('libcudart.so.12: cannot open shared object file')",
        "RuntimeError('operator xformers::x does not exist')",
        "ImportError('cannot import name x')",
        "SystemExit(1)",
    ],
    ids=lambda text: text.partition("(")[0],
)
def test_an_xformers_whose_import_raises_is_broken_with_the_cause_and_tried_once(tmp_path, raised):
    tries = tmp_path / "tries"
    with installed(tmp_path, changes={"ops/__init__": f"open({str(tries)!r}, 'a').write('+')\nraise {raised}"}):
        state, reason, _ = only(conditions())
    kind, _, text = raised.partition("(")
    assert state == "broken"
    assert f"importing xformers 0.0.35 beside torch {torch.__version__} raises {kind}: " in reason
    assert text[:-1].strip("'") in reason
    assert tries.read_text() == "+"


def test_a_flash_attn_without_its_extension_is_named_as_what_breaks_xformers(tmp_path):
    neighbour = tmp_path / "flash_attn"
    neighbour.mkdir()
    (neighbour / "__init__.py").write_text("import flash_attn_2_cuda\n", encoding="utf-8")
    source = f"import flash_attn\n{source_of('ops/fmha/flash')}"
    try:
        with installed(tmp_path, changes={"ops/fmha/flash": source}):
            state, reason, _ = only(conditions())
    finally:
        sys.modules.pop("flash_attn", None)
    assert state == "broken"
    assert "raises ModuleNotFoundError: No module named 'flash_attn_2_cuda'" in reason
    assert reason.endswith(
        "flash-attn is installed and broken, and xFormers imports it: reinstall it, or `pip uninstall flash-attn`"
    )


def test_an_extension_that_does_not_load_tells_why_though_xformers_hides_it(tmp_path):
    with installed(tmp_path, changes={"ops/fmha/cutlass": WITH_CUTLASS["ops/fmha/cutlass"]}):
        found = conditions()["xformers/cutlass"]
    assert found.state == "unavailable"
    assert f"the extension of xformers 0.0.35 cannot be loaded beside torch {torch.__version__}" in found.reason
    assert "the double has no extension" in found.reason


def sees_cuda_devices(monkeypatch, count):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_a_cuda_device_an_operator_that_is_whole_says_so(tmp_path, monkeypatch):
    sees_cuda_devices(monkeypatch, 0)
    with installed(tmp_path, changes=WITH_CUTLASS):
        found = conditions()["xformers/cutlass"]
    assert (found.state, found.reason) == ("unavailable", "torch sees no CUDA device here")


def test_with_one_it_is_ready(tmp_path, monkeypatch):
    sees_cuda_devices(monkeypatch, 1)
    with installed(tmp_path, changes=WITH_CUTLASS):
        found = conditions()
    assert {name for name, each in found.items() if each.state == "ready"} == {"xformers/cutlass"}


def test_an_operator_that_is_not_built_says_what_it_needs(tmp_path):
    with installed(tmp_path, changes={"_cpp_lib": LOADED}):
        found = conditions()["xformers/flash3"]
    assert found.state == "unavailable"
    assert found.reason == "flash3-F of xformers 0.0.35 is not built; it needs flash-attn-3"


def test_an_operator_that_a_release_does_not_have_says_so(tmp_path):
    with installed(tmp_path, changes={"_cpp_lib": LOADED, "ops/fmha/ck": "'There is none.'"}):
        found = conditions()
    assert found["xformers/ck"].reason == "xformers 0.0.35 has no operator ck.FwOp"
    assert found["xformers/cutlass"].reason != found["xformers/ck"].reason


def test_operators_that_live_in_another_library_are_found_through_xformers(tmp_path, monkeypatch):
    sees_cuda_devices(monkeypatch, 1)
    elsewhere = tmp_path / "mslk_of_tomorrow.py"
    elsewhere.write_text(
        source_of("ops/fmha/cutlass").replace("from .common", "from xformers.ops.fmha.common") + BUILT, "utf-8"
    )
    stub = "from mslk_of_tomorrow import BwOp, FwOp\n"
    try:
        with installed(tmp_path, changes={"_cpp_lib": LOADED, "ops/fmha/cutlass": stub}):
            assert conditions()["xformers/cutlass"].state == "ready"
    finally:
        sys.modules.pop("mslk_of_tomorrow", None)


def test_an_xformers_whose_operators_library_is_missing_names_it(tmp_path):
    """It hides that, and is imported without any operator."""
    with installed(tmp_path, changes={"ops/fmha/__init__": ""}):
        state, reason, fix = only(conditions())
    assert state == "absent"
    assert reason == "xformers 0.0.35 takes its operators from mslk, which is not installed"
    assert fix == "pip install mslk"


def test_operators_of_another_library_need_no_extension_of_xformers(tmp_path, monkeypatch):
    sees_cuda_devices(monkeypatch, 1)
    source = WITH_CUTLASS["ops/fmha/cutlass"] + "    operator.__module__ = 'mslk.attention.fmha.cutlass'\n"
    with installed(tmp_path, changes={"ops/fmha/cutlass": source}):
        assert conditions()["xformers/cutlass"].state == "ready"


def test_listing_the_kernels_imports_no_xformers(tmp_path):
    with installed(tmp_path, changes={"__init__": "raise SystemExit('xFormers was imported')"}):
        asked = """
import sys
import attn_xformers, attn_xformers.plugin
names = [kernel.name for kernel in attn_xformers.plugin.attn_kernels()]
assert len(names) == 8, names
for kernel in attn_xformers.plugin.attn_kernels():
    assert kernel.declarations, kernel
assert not [name for name in sys.modules if name.partition(".")[0] == "xformers"]
"""
        paths = [str(tmp_path), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        done = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stderr


def test_before_it_is_weighed_a_kernel_declares_all_that_can_be_translated(tmp_path):
    kernel = next(kernel for kernel in KERNELS if kernel.name == "xformers/cutlass")
    with installed(tmp_path, changes={"_cpp_lib": LOADED}):
        [widest] = kernel.declarations
        assert widest.head_dims == range(1, (1 << 16) + 1)
        assert kernel.probe() is not None
        [own] = kernel.declarations
        assert own.head_dims != widest.head_dims
        assert (own.biases, own.gqa, own.dtypes) == (frozenset(), False, {torch.float16, torch.bfloat16})
