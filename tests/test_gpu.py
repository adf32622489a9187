"""The script for GPU machines, as far as a machine without one can tell."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GPU = ROOT / "gpu"
MODULES = ("run", "sources", "probes", "conformance", "sanitizer", "figures", "timing")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so it would run")


@pytest.fixture
def script(monkeypatch):
    """Imports a module of the folder by its name, as the script does."""
    monkeypatch.syspath_prepend(str(GPU))
    before = list(sys.path)
    yield importlib.import_module
    sys.path[:] = before
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(out=tmp_path / "out", kernels="torch/math", limit=60.0, rounds=2, only=None)


def run_script(*arguments, cwd):
    command = [sys.executable, str(GPU / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@without_cuda
def test_without_a_device_it_says_so_ends_with_3_and_writes_nothing(tmp_path):
    done = run_script("--out", "results", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("no CUDA device, so nothing was run: torch ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--wheels", "nowhere"], "there is no folder nowhere"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--limit", "0"], "0 is not above 0"),
        (["--wheels", "."], "note.whl is no wheel"),
    ],
    ids=["no such folder", "no such step", "no time", "no wheel"],
)
def test_what_is_wrong_with_its_arguments_is_said_before_anything_runs(tmp_path, arguments, text):
    (tmp_path / "note.whl").write_text("not a wheel")
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["note.whl"]


def test_its_help_says_how_to_fill_the_folder_of_wheels(script):
    text = script("run").parser().format_help()
    (line,) = [line for line in text.splitlines() if "pip download" in line]
    assert set(script("sources").NEEDED.values()) <= set(line.split())


def test_the_metadata_of_a_source_tree_is_that_of_the_package(script, tmp_path):
    script("sources").write_metadata(ROOT / "core", tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    installed = importlib.metadata.distribution("attn-core")
    assert (found.metadata["Name"], found.version) == ("attn-core", installed.version)
    points = [(p.group, p.name, p.value) for p in found.entry_points]
    assert points == [(p.group, p.name, p.value) for p in installed.entry_points if p.group == "attn.plugins"]
    assert set(found.requires) == {line for line in installed.requires if "extra ==" not in line}


def test_sources_are_imported_before_and_wheels_after_what_is_installed(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WHERE = __file__\n")
        wheel.writestr("torch/__init__.py", "raise ImportError('not this one')\n")
    code = f"""
import sys, tempfile, pathlib
sys.path.insert(0, {str(GPU)!r})
import sources
with tempfile.TemporaryDirectory() as folder:
    print(sources.make_importable(pathlib.Path(folder), pathlib.Path({str(tmp_path)!r})))
    import attn_core, carried, torch
    print(attn_core.__file__)
    print(*(plugin.name for plugin in attn_core.plugins()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheels, where, plugins = done.stdout.splitlines()
    assert wheels == "['carried-1.0-py3-none-any.whl']"
    assert Path(where).is_relative_to(ROOT / "core" / "src")
    assert "torch" in plugins.split()


def test_a_file_is_written_whole_or_not_at_all(script, tmp_path):
    write = script("run").write_json
    write(tmp_path / "a.json", {"µs": 1.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"µs": 1.5}
    with pytest.raises(TypeError):
        write(tmp_path / "a.json", {"µs": object()})
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "b.json", {"µs": "\ud800"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"µs": 1.5}


def test_the_probes_come_first_since_all_else_rests_on_them(script):
    assert script("run").STEPS[0] == "probes"


def test_a_step_that_raises_has_failed_and_the_others_run_all_the_same(script, options, monkeypatch):
    run = script("run")
    monkeypatch.setattr(script("probes"), "run", lambda options: {"outcome": "passed", "reason": "9 probes"})
    monkeypatch.setattr(run, "machine", lambda: {"device": "none"})
    monkeypatch.setattr(script("conformance"), "run", lambda options: {"outcome": "passed", "kernels": []})
    monkeypatch.setattr(script("sanitizer"), "run", lambda options: {"outcome": "not run", "reason": "not there"})
    monkeypatch.setattr(script("figures"), "run", lambda options: 1 / 0)
    options.out.mkdir()
    assert run.run_steps(options, ["a.whl"]) == 1
    summary = json.loads((options.out / "summary.json").read_text())
    assert (summary["form"], summary["machine"], summary["wheels"]) == (1, {"device": "none"}, ["a.whl"])
    assert {name: step["outcome"] for name, step in summary["steps"].items()} == {
        "probes": "passed",
        "conformance": "passed",
        "sanitizer": "not run",
        "figures": "failed",
    }
    assert "ZeroDivisionError" in json.loads((options.out / "figures.json").read_text())["reason"]
    monkeypatch.setattr(script("figures"), "run", lambda options: {"outcome": "passed"})
    options.only = ["figures"]
    assert run.run_steps(options, []) == 0


@pytest.fixture
def probed(script, options, monkeypatch, tmp_path):
    """Runs the step with these probes in place of the real ones, for a kernel called cuda-ref/simple."""
    probes = script("probes")
    from attn_core.registry import registry

    def run(text):
        tests = tmp_path / "test_doubled.py"
        tests.write_text(text)
        monkeypatch.setattr(probes, "TESTS", tests)
        named = argparse.Namespace(name="cuda-ref/simple")
        monkeypatch.setattr(registry, "kernels", lambda pattern: [named])
        options.out.mkdir()
        return probes.run(options)

    return run


PROBES = """
import pytest

@pytest.mark.parametrize("machine", ["plain forward", "gpu"])
def test_shuffles(machine):
    assert machine == "gpu", "an emulator is not what is asked for"

@pytest.mark.parametrize("machine", ["gpu"])
def test_copies(machine):
    pytest.skip("from sm_80 on")
"""


def test_the_probes_of_the_device_are_rows(probed, options):
    found = probed(PROBES)
    assert (found["outcome"], found["reason"], found["passed"], found["skipped"]) == ("passed", "1 probes", 1, 1)
    assert found["rows"][0] == {"probe": "test_shuffles[gpu]", "outcome": "passed"}
    assert found["rows"][1]["reason"] == "from sm_80 on"
    assert list(options.out.iterdir()) == [], "all of it is in the rows"


@pytest.mark.parametrize(
    ("text", "reason", "failed"),
    [
        (PROBES.replace('assert machine == "gpu"', "assert 2 + 2 == 5"), "2 + 2", 1),
        (PROBES.replace("    assert", "    pytest.skip('no CUDA device')\n    assert"), "no probe could run", 0),
        ("import pytest\nimport nowhere_to_be_found\n", "nowhere_to_be_found", 1),
    ],
    ids=["a primitive that is not what it is believed to be", "nothing runs", "an error"],
)
def test_probes_that_fail_or_do_not_run_fail_their_step(probed, text, reason, failed):
    found = probed(text)
    assert found["outcome"] == "failed"
    assert reason in found["reason"]
    assert (found["passed"], found["failed"]) == (0, failed)


def test_probes_are_not_run_for_other_kernels_nor_without_pytest(script, options, monkeypatch):
    probes = script("probes")
    found = probes.run(options)
    assert (found["outcome"], found["reason"]) == ("not run", "no kernel of cuda-ref is among torch/math")
    from attn_core.registry import registry

    monkeypatch.setattr(registry, "kernels", lambda pattern: [argparse.Namespace(name="cuda-ref/simple")])
    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    found = probes.run(options)
    assert (found["outcome"], found["reason"][:25]) == ("not run", "pytest cannot be imported")


def test_the_real_probes_have_one_of_the_device_for_each_primitive(script):
    tests = script("probes").TESTS
    entries = set(re.findall(r"__global__ void (\w+)\(", (tests.parent / "gpu" / "probes.cu").read_text()))
    assert len(entries) > 10
    assert {name for name in entries if f'run("{name}"' in tests.read_text()} == entries


def test_conformance_checks_what_can_run_and_writes_certificates(script, options, monkeypatch):
    conformance = script("conformance")
    from attn_core.conformance import isolated

    one_check = functools.partial(isolated.check_isolated, only="repeats_itself")
    monkeypatch.setattr(isolated, "check_isolated", one_check)
    monkeypatch.setattr(conformance, "DEVICE", "cpu")
    found = conformance.run(options)
    assert found["outcome"] == "passed", found
    (row,) = found["kernels"]
    assert (row["kernel"], row["outcome"], row["failed"]) == ("torch/math", "passed", 0)
    assert row["passed"] > 0
    assert json.loads((options.out / "certificates" / "torch-math.cpu.json").read_text())["granted"]
    json.dumps(found)


def test_a_kernel_that_cannot_run_here_is_a_row_with_the_reason(script, options, monkeypatch):
    conformance = script("conformance")
    monkeypatch.setattr(conformance, "DEVICE", "toaster")
    monkeypatch.setattr(options, "kernels", "torch/efficient")
    found = conformance.run(options)
    assert found["kernels"] == [
        {"kernel": "torch/efficient", "outcome": "not run", "reason": "declares nothing for toaster"}
    ]
    assert (found["outcome"], found["reason"]) == ("failed", "no kernel could run")


def test_without_compute_sanitizer_its_step_says_that_it_was_not_run(script, options, monkeypatch, tmp_path):
    sanitizer = script("sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "PLACES", ())
    found = sanitizer.run(options)
    assert (found["outcome"], found["reason"]) == ("not run", "there is no compute-sanitizer on this machine")


@pytest.mark.parametrize(
    ("ends", "outcome", "reason"),
    [
        ("exit 0", "passed", ""),
        ("echo 'Invalid __global__ read'; exit 86", "failed", "found something: Invalid __global__ read"),
        ("exit 1", "failed", "ended with 1: "),
        ("sleep 30", "failed", "did not end within 3 s"),
    ],
)
def test_what_compute_sanitizer_finds_is_a_row(script, options, monkeypatch, tmp_path, ends, outcome, reason):
    sanitizer, conformance = script("sanitizer"), script("conformance")
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{ends.replace('sleep', 'exec sleep')}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(conformance, "DEVICE", "cpu")
    monkeypatch.setattr(sanitizer, "TOOLS", ("memcheck",))
    options.limit = 0.3
    found = sanitizer.run(options)
    (row,) = found["rows"]
    assert (row["kernel"], row["tool"], row["outcome"], row.get("reason", "")) == (
        *("torch/math", "memcheck", outcome),
        reason,
    )
    assert found["outcome"] == outcome


def test_every_tool_of_compute_sanitizer_sees_each_tensor_in_memory_of_its_own(script, options, monkeypatch, tmp_path):
    sanitizer, conformance = script("sanitizer"), script("conformance")
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(conformance, "DEVICE", "cpu")
    assert sanitizer.run(options)["outcome"] == "passed"
    called = (tmp_path / "called").read_text().splitlines()
    assert called == ["memcheck 1", "racecheck 1", "initcheck 1", "synccheck 1"]


def test_the_small_problems_are_few_and_have_a_dtype_each(script):
    sanitizer = script("sanitizer")
    labels = [case.label for case in sanitizer.smoke_cases("torch/math", "cpu")]
    assert {"dtype float32", "dtype bfloat16", "dtype float16"} <= set(labels)
    assert any(label.startswith("bias Causal") for label in labels)
    assert len(labels) < 20
    assert sanitizer.smoke("torch/math", "cpu") == len(labels)


def test_the_figures_are_rows_that_json_can_hold(script, options, monkeypatch):
    figures = script("figures")
    monkeypatch.setattr(figures, "HEADS", 1)
    monkeypatch.setattr(figures, "CALLS_SMALL", 3)
    monkeypatch.setattr(figures, "CALLS_LARGE", 1)
    found = json.loads(json.dumps(figures.run(options, device="cpu", seqlens=(64,))))
    assert found["outcome"] == "passed", found
    assert [row["path"] for row in found["dispatch"] if "over" in row] == ["attention", "attention, causal"]
    assert [row["bias"] for row in found["biases"]] == list(figures.kinds(64))
    assert all(row["torch, ms"] > 0 and row["attention, ms"] > 0 and "/" in row["kernel"] for row in found["biases"])


def test_a_figure_that_cannot_be_taken_fails_its_step_and_keeps_the_others(script, options, monkeypatch):
    figures = script("figures")
    monkeypatch.setattr(figures, "kinds", lambda seqlen: {"none": None, "an object": object()})
    monkeypatch.setattr(figures, "CALLS_SMALL", 1)
    found = figures.run(options, device="cpu", seqlens=(8,))
    assert found["outcome"] == "failed"
    assert "no figure for an object of 8" in found["reason"]
    good, bad = found["biases"]
    assert "attention, ms" in good
    assert "AttributeError" in bad["reason"]
