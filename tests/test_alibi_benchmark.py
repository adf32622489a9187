"""benchmarks/alibi.py: every way means the same, and what does not fit is left out by name."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPT = FOLDER / "alibi.py"


@pytest.fixture(scope="module")
def alibi():
    sys.path.insert(0, str(FOLDER))  # it imports the harness beside it
    try:
        spec = importlib.util.spec_from_file_location("alibi_benchmark", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("what", ["forward", "forward + backward"])
def test_every_way_means_the_same(alibi, dtype, what):
    point = alibi.Point(dtype, 4, 48, what)
    calls = alibi.ways(point, alibi.operands(point))
    assert set(calls) == {alibi.BY_ATTN, alibi.WRITTEN_OUT, alibi.BY_HAND, alibi.MADE_ANEW}
    outs = {name: make()() for name, make in calls.items()}
    assert {out.dtype for out in outs.values()} == {getattr(torch, dtype)}
    tolerance = alibi.TOLERANCE[dtype]
    for name, out in outs.items():
        torch.testing.assert_close(out, outs[alibi.BY_HAND], atol=tolerance, rtol=tolerance, msg=name)


def test_without_options_dtypes_heads_and_lengths_are_varied_one_at_a_time(alibi):
    found = alibi.points(None, None, None, (alibi.FORWARD,))
    assert {point.seqlen for point in found} == {512, 1024, 2048, 4096, 8192}
    assert {point.dtype for point in found} == {"float32", "float16", "bfloat16"}
    assert {point.num_heads for point in found} == {8, 16, 32}
    assert len(found) == len(set(found)) == 9


def test_options_are_combined(alibi):
    found = alibi.points(["float16"], [8, 32], [512, 1024], (alibi.FORWARD, alibi.BOTH))
    assert len(found) == len(set(found)) == 8
    assert {point.dtype for point in found} == {"float16"}


def test_what_does_not_fit_is_left_out_by_name_with_the_arithmetic(alibi):
    point = alibi.Point("float16", 32, 16384)
    fit, left_out = alibi.fitting(point, (alibi.BY_ATTN, alibi.BY_HAND, alibi.WRITTEN_OUT), 10e9)
    assert fit == [alibi.BY_ATTN]
    by_hand = "2 * 32 * 16384^2 + 3 * 4 * 16384^2 bytes = 20.4 GB, above 10.0 GB"
    written_out = "2 * 32 * 16384^2 + 2 * 4 * 32 * 16384^2 bytes = 85.9 GB, above 10.0 GB"
    assert left_out == [
        f"float16, H 32, S 16384, forward: torch, mask: left out, {by_hand}",
        f"float16, H 32, S 16384, forward: attention, TensorBias: left out, {written_out}",
    ]


def test_the_command_prints_progress_and_writes_both_parts(tmp_path):
    options = ["--lengths", "64", "--heads", "2", "--dtypes", "bfloat16", "--what", "both", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--json", str(tmp_path / "alibi.json")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "speed: bfloat16, H 2, S 64, forward + backward …" in done.stderr
    sections = json.loads((tmp_path / "alibi.json").read_text())["sections"]
    times, peaks = (sections[title] for title in ("time, causal, D 64", "peak memory over operands and results"))
    point = "bfloat16, H 2, S 64, forward + backward"
    assert [row["name"] for row in times] == [
        f"{point}: {name}" for name in ("attention, ALiBi", "attention, TensorBias", "torch, mask made")
    ]
    assert all(row["value"] > 0 for row in times)
    assert [row["name"] for row in peaks] == [
        f"{point}: {name}" for name in ("attention, ALiBi", "attention, TensorBias", "torch, mask")
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--heads", "12"], "--heads: takes powers of 2, as the mask by hand does, got 12"),
        (["--lengths", "0"], "--lengths: takes numbers from 1 on, got 0"),
        (["--dtypes", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_what_it_cannot_measure_is_refused(options, text):
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert text in done.stderr
