"""attn profile-na: what it prints, saves and loads, and what it says to flags that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attn_core
import importlib_metadata
import pytest
import torch
from attn_core.cli.group import load_command
from attn_core.errors import InputError
from attn_core.torch_kernels.tiling.chosen import Tiles, chosen
from attn_natten import na2d
from attn_natten.profile import Case, Result, load, measure, optimize
from attn_natten.profile.command import profile_na
from click.testing import CliRunner

SMALL = ["-i", "12", "14", "-w", "3", "5", "-n", "2", "-d", "8"]
QUICK = ["--warmup-steps", "0", "--steps", "1", "--optimize-warmup-steps", "0", "--optimize-steps", "1"]


def run(*arguments, code=0):
    result = CliRunner().invoke(profile_na, [*arguments], prog_name="attn profile-na")
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result.output


def one_line(text):
    return " ".join(text.split())


def case(**changes):
    sizes = {"spatial": (12, 14), "kernel_size": (3, 5), "stride": (1, 1), "dilation": (1, 1)}
    return Case(
        **(
            sizes
            | {"is_causal": (False, False), "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "head_dim_v": 8}
            | changes
        )
    )


def test_it_is_a_command_of_attn():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (value,) = re.findall(r'^profile-na = "(.*)"$', text, re.MULTILINE)
    entry_point = importlib_metadata.EntryPoint("profile-na", value, "attn.commands")
    assert load_command("profile-na", [entry_point]) is profile_na


# Running


def test_it_prints_the_time_of_the_kernel_that_attn_picks():
    text = run(*SMALL, *QUICK)
    x = torch.empty(1, 168, 2, 8, device="cpu")
    kernel = attn_core.explain(x, x, x, case().neighborhood()).chosen
    assert "na2d of 1 x 12x14, window 3x5, heads 2, head_dim 8, float32, cpu" in text
    (row,) = (line for line in text.splitlines() if "forward" in line)
    assert kernel in row
    assert "backward" not in text


def test_it_prints_the_backward_too_where_it_is_asked_for():
    text = run(*SMALL, *QUICK, "--backprop", "--kernel", "torch/tiled", "--add-kv", "3")
    rows = [line for line in text.splitlines() if "torch/tiled" in line]
    assert [row.split()[1] for row in rows] == ["forward", "backward"]
    assert "3 additional, forward and backward" in one_line(text)


@pytest.mark.parametrize(
    "sizes", [["-i", "12,14", "-w", "3,5"], ["-i", "12x14", "-w", "3x5"], ["--input-size", "12", "14", "-w", "3", "5"]]
)
def test_sizes_may_be_written_in_several_ways(sizes):
    assert "1 x 12x14, window 3x5" in run(*sizes, "--dry-run")


def test_one_value_is_for_all_axes_and_a_window_that_is_not_given_is_everything():
    assert "1 x 12x14, window 3x3, dilation 2x2, causal True" in run(
        "-i", "12", "14", "-w", "3", "--dilation", "2", "-c", "True", "--dry-run"
    )
    assert "1 x 6x7, window 6x7, heads" in run("-i", "6", "7", "--dry-run")


def test_tiles_of_the_command_line_are_those_that_run(monkeypatch):
    seen = []
    original = measure.CALLS[2]

    def noting(*arguments, **options):
        seen.append(chosen())
        return original(*arguments, **options)

    monkeypatch.setitem(measure.CALLS, 2, noting)
    run(*SMALL, *QUICK, "--backprop", "--kernel", "torch/tiled", "--q-tile", "4", "8", "--backward-q-tile", "8,8")
    assert {(now.forward.box, now.backward.box) for now in seen} == {((4, 8), (8, 8))}


# Dry run


def test_a_dry_run_lists_what_could_run_and_why_not_the_others():
    text = run(*SMALL, "--dry-run", "--backprop")
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") == 5}
    assert "chosen" in text
    assert "forward, 9: its own; box 1x8" in one_line(text)
    assert {"torch/tiled", "torch/math", "torch/reference"} <= set(rows)
    (efficient,) = (line for name, line in rows.items() if name == "torch/cudnn")
    assert "unavailable" in efficient or "refused" in efficient


def test_a_dry_run_shows_as_many_configurations_as_it_is_told_to():
    few = one_line(run(*SMALL, "--dry-run", "--kernel", "torch/tiled", "--max-configs", "2"))
    assert "its own; box 1x8; … 7 more" in few
    every = one_line(run(*SMALL, "--dry-run", "--kernel", "torch/tiled", "--max-configs", "0", "--thorough"))
    assert "more" not in every
    assert "batch_bytes 262144" in every


def test_a_dry_run_needs_no_such_device():
    text = run(*SMALL, "--dry-run", "--device", "cuda", "--dtype", "bf16")
    assert "bfloat16, cuda" in text


def test_a_dry_run_in_which_nothing_could_run_fails():
    text = run(*SMALL, "--dry-run", "--kernel", "torch/cudnn", code=1)
    assert "no kernel takes na2d of 1 x 12x14" in text


# Searching


def test_a_search_saves_the_best_and_it_is_loaded_again(tmp_path):
    path = tmp_path / "best.json"
    text = run(*SMALL, *QUICK, "--backprop", "--optimize", "--out", str(path))
    best = load(path)
    assert f"Best: {best.kernel}" in text
    assert f"attn profile-na --load {path} runs it" in one_line(text)
    assert best.case == case(backward=True)
    saved = json.loads(path.read_text())
    assert saved["case"]["spatial"] == [12, 14]
    assert {trial["direction"] for trial in saved["trials"]} == {"forward", "backward"}
    assert Result.from_dict(saved) == best
    again = run("--load", str(path), *QUICK)
    assert best.kernel in again
    assert "window 3x5" in again


def test_the_best_is_what_took_the_least_in_both_directions_together():
    best = optimize(case(backward=True), kernels=["torch/tiled", "torch/math"], warmup_steps=0, steps=1)
    totals = {}
    for kernel in ("torch/tiled", "torch/math"):
        totals[kernel] = sum(
            min(trial.seconds for trial in best.trials if (trial.kernel, trial.direction) == (kernel, direction))
            for direction in ("forward", "backward")
        )
    assert best.kernel == min(totals, key=totals.get)
    assert best.best("forward").seconds + best.best("backward").seconds == pytest.approx(min(totals.values()))
    of_tiled = [trial.configuration for trial in best.trials if trial.kernel == "torch/tiled"]
    assert of_tiled[0] == Tiles()
    assert len(of_tiled) > 5


def test_within_a_result_calls_run_by_its_kernel_in_its_tiles():
    x = torch.randn(1, 12, 14, 2, 8)
    result = Result(case=case(), kernel="torch/tiled", forward=Tiles(box=(4, 4)), backward=None)
    with attn_core.record() as calls, result.applied():
        assert chosen().forward == Tiles(box=(4, 4))
        out = na2d(x, x, x, kernel_size=(3, 5))
    assert calls.kernels == {"torch/tiled": 1} or [row.kernel for row in calls] == ["torch/tiled"]
    assert chosen() is None
    torch.testing.assert_close(out, na2d(x, x, x, kernel_size=(3, 5)))


def test_a_search_leaves_hopeless_kernels_out_and_says_so(tmp_path):
    text = one_line(
        run("-i", "40", "40", "-w", "5", "-n", "1", "-d", "8", *QUICK, "--optimize", "--out", str(tmp_path / "x.json"))
    )
    assert "torch/reference: left out, its estimate is far beyond the best; --kernel torch/reference times it" in text
    tried = {trial.kernel for trial in load(tmp_path / "x.json").trials}
    assert "torch/reference" not in tried
    assert "torch/tiled" in tried


def test_trials_are_nobodys_calls(tmp_path):
    state = torch.get_rng_state()
    with attn_core.record() as calls:
        optimize(case(), kernels=["torch/tiled"], warmup_steps=0, steps=1)
    assert len(calls) == 0
    assert torch.equal(torch.get_rng_state(), state)


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input-size: missing; such as -i 56 56"),
        (["-i", "twelve"], "'twelve' is not whole numbers on 1 to 3 axes, such as 56 56 or 56,56"),
        (["-i", "2", "3", "4", "5"], "'2,3,4,5' is not whole numbers on 1 to 3 axes"),
        (
            ["-i", "12", "14", "-w", "3", "5", "7"],
            "--window-size 3 5 7: takes one value, or 2, as many as --input-size 12 14",
        ),
        (["-i", "12", "14", "-w", "13"], "--input-size 12 14 --window-size 13 13: kernel_size"),
        (
            ["-i", "12", "14", "-w", "5", "--dilation", "3"],
            "--dilation 3: kernel_size, dilation: each axis must be at least",
        ),
        (["-i", "12", "14", "-w", "3", "-s", "4"], "--stride 4: stride: must be from 1 to kernel_size=3, got 4"),
        (["-i", "12", "14", "-c", "maybe"], "'maybe' is not True or False on 1 to 3 axes"),
        (["-i", "12", "-w", "3", "-n", "4", "--heads-kv", "3"], "--heads-kv 3: must divide --heads 4"),
        (["-i", "12", "-w", "3", "--dtype", "int8"], "'int8' is not one of"),
        (
            ["-i", "12", "-w", "3", "--device", "nowhere"],
            "--device nowhere: device: takes a device of torch, got 'nowhere'",
        ),
        (["-i", "12", "-w", "3", "--device", "cuda:7"], "--device cuda:7: is not there"),
        (
            ["-i", "12", "-w", "3", "--backend", "fastest"],
            "takes cutlass-fna, hopper-fna, blackwell-fna, flex-fna, got 'fastest'",
        ),
        (["-i", "12", "-w", "3", "--backend", "cutlass-fna", "--kernel", "torch/tiled"], "one or the other"),
        (["-i", "12", "-w", "3", "--kernel", "torch/tild"], "torch/tild"),
        (
            ["-i", "12", "-w", "3", "--kernel", "torch/tiled", "--kernel", "torch/math"],
            "--kernel: takes one without --dry-run",
        ),
        (["-i", "12", "-w", "3", "--dry-run", "--optimize"], "--dry-run and --optimize: one at a time"),
        (["-i", "12", "-w", "3", "--optimize", "--q-tile", "4"], "--q-tile: not here, --optimize finds them"),
        (["-i", "12", "-w", "3", "--kernel", "torch/tiled", "--q-tile", "4", "4"], "--q-tile 4 4: takes 1 values"),
        (
            ["-i", "12", "-w", "3", "--kernel", "torch/tiled", "--q-tile", "0"],
            "--q-tile: torch/tiled: Tiles: box must be of ints >= 1",
        ),
        (
            ["-i", "12", "-w", "3", "--kernel", "torch/tiled", "--kv-tile", "4"],
            "--kv-tile: torch/tiled: takes q_tile alone",
        ),
        (
            ["-i", "12", "-w", "3", "--kernel", "torch/tiled", "--backward-q-tile", "4"],
            "--backward-q-tile: needs --backprop",
        ),
        (
            ["-i", "12", "-w", "3", "--kernel", "torch/math", "--q-tile", "4"],
            "--q-tile: torch/math: chooses how it runs by itself",
        ),
        (["-i", "12", "-w", "3", "--optimize", "--out", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--load", "/nowhere/x.json"], "'/nowhere/x.json' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_flag_and_the_value(arguments, message):
    assert message in one_line(run(*arguments, code=2).replace("│", " "))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "this is no result of attn profile-na --optimize"),
        ('{"format": "attn profile-na", "version": 9}', "version: takes 1, got 9"),
        ('{"format": "attn profile-na", "version": 1}', "backward, case, forward, kernel, torch, trials: missing"),
    ],
    ids=["no JSON", "another file", "newer", "incomplete"],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in one_line(run("--load", str(path), code=2))


def test_a_result_of_another_shape_names_what_is_wrong(tmp_path):
    path = tmp_path / "result.json"
    Result(case=case(), kernel="torch/tiled", forward=Tiles(box=(4, 4)), backward=None).save(path)
    saved = json.loads(path.read_text())
    for changes, message in (
        ({"case": saved["case"] | {"windows": 3}}, "unknown: \\['windows'\\]"),
        ({"case": saved["case"] | {"kernel_size": [99, 5]}}, "kernel_size"),
        ({"case": saved["case"] | {"dtype": "int8"}}, "dtype: takes"),
        ({"forward": {"boxes": [4]}}, "takes batch_bytes, box, strip_bytes, got 'boxes'"),
        ({"forward": 3}, "configuration: takes a mapping, got 3"),
        ({"kernel": "torch/math"}, "configuration: this kernel has none"),
    ):
        path.write_text(json.dumps(saved | changes))
        with pytest.raises(ValueError, match=message):
            load(path)


def test_help_teaches():
    text = one_line(run("--help"))
    for words in (
        "Time neighborhood attention",
        "attn profile-na -i 56 56 -w 7 7",
        "best.applied()",
        "--dry-run",
        "--optimize",
    ):
        assert words in text
