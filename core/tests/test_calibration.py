"""Constants fitted to measured times: the fit, the file they are kept in, and what they change. No time is asserted."""

import json
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import attn_core
import pytest
import torch
from attn_core import (
    ANY_DIM,
    CalibrationWarning,
    Capabilities,
    Causal,
    Cost,
    InputError,
    Kernel,
    Problem,
    Window,
    Work,
    attention,
    explain_problem,
    register,
)
from attn_core import calibration as calibrating
from attn_core.cli.group import main
from attn_core.costs_file import Calibration, UnusableFileError, as_data, device_name, read_costs, write_costs
from attn_core.least_squares import nonnegative_least_squares, relative_least_squares
from attn_core.rates import Rates, Written, shipped_rates
from attn_core.registry import registry
from click.testing import CliRunner

SEED = 20261121
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Where this test's constants are kept; before and after it there are none."""
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setenv("ATTN_COSTS", str(path))
    attn_core.refresh()
    yield path
    path.unlink(missing_ok=True)
    attn_core.refresh()


def calibration(**given):
    return Calibration(
        **{"device": "cpu", "name": device_name(), "torch": torch.__version__, "threads": THREADS, **given}
    )


def problem(seqlen=64, **given):
    sizes = {"batch": 1, "seqlen_q": seqlen, "seqlen_kv": seqlen, "num_heads": 4, "num_kv_heads": 4}
    if given.get("bias") is not None:
        given["bias"] = given["bias"].bind(seqlen, seqlen)
    return Problem(**{**sizes, "head_dim": 32, "head_dim_v": 32, "dtype": torch.float32, "device": "cpu", **given})


def toy(name="toy/steady", **given):
    def run(query, key, value, *, scale):
        return query

    able = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, backward=True)
    return Kernel(**{"name": name, "run": run, "capabilities": able, "costs": {"cpu": Cost(call=1.0)}, **given})


def attn(*arguments, exit_code=0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.output


# The fit


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_satisfies_the_conditions_of_an_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(24, 7, dtype=torch.float64, generator=generator)
    target = torch.randn(24, dtype=torch.float64, generator=generator)
    x = nonnegative_least_squares(matrix, target)
    slope = matrix.T @ (matrix @ x - target)
    assert bool((x >= 0).all())
    torch.testing.assert_close(slope[x > 0], torch.zeros_like(slope[x > 0]), atol=1e-9, rtol=0)
    assert bool((slope[x == 0] >= -1e-9).all())


def test_columns_that_say_the_same_do_not_stop_the_fit():
    column = torch.arange(1.0, 9.0, dtype=torch.float64)
    x = nonnegative_least_squares(torch.stack([column, column, torch.zeros_like(column)], 1), 3 * column)
    assert float(x[0] + x[1]) == pytest.approx(3.0)
    assert float(x[2]) == 0.0


def test_constants_of_very_different_size_are_found():
    chance = random.Random(SEED)
    quantities = torch.tensor(
        [[1.0, 10 ** chance.uniform(3, 9), 10 ** chance.uniform(2, 6)] for _ in range(24)], dtype=torch.float64
    )
    constants = torch.tensor([2e-5, 3e-11, 4e-9], dtype=torch.float64)
    found = relative_least_squares(quantities, quantities @ constants)
    torch.testing.assert_close(found, constants, rtol=1e-6, atol=0)


def test_one_spoilt_time_does_not_bend_the_rest():
    chance = random.Random(SEED)
    quantities = torch.tensor([[1.0, 10 ** chance.uniform(3, 7)] for _ in range(24)], dtype=torch.float64)
    constants = torch.tensor([2e-5, 3e-11], dtype=torch.float64)
    seconds = quantities @ constants
    seconds[5] *= 20
    found = relative_least_squares(quantities, seconds)
    torch.testing.assert_close(found, constants, rtol=0.05, atol=0)


def synthetic(kernel, *, grad):
    """Problems with the times that the kernel's own constants give."""
    cases = calibrating.cases_for(kernel, grad=grad, longest=1e9)
    return [(each.problem, kernel.terms(each.problem).seconds(each.problem)) for each in cases]


@pytest.mark.parametrize("name", ["torch/flash", "torch/math", "torch/tiled"])
def test_the_fit_finds_the_constants_that_made_the_times(name):
    kernel = registry.kernel(name)
    both = Cost(call=3e-4, pair_dim=2e-10, pair=5e-9, token_dim=3e-9, token=2e-7, part=5e-5)
    true = Cost(call=4e-5, pair_dim=5e-11, pair=2e-9, token_dim=1e-9, token=1e-7, part=2e-5, with_backward=both)
    if name != "torch/tiled":
        true = replace(true, mask=3e-10, element=4e-9, part=0.0, with_backward=replace(both, part=0.0))
    made = replace(kernel, costs={"cpu": replace(true, threads=THREADS)})
    measured = [pair for grad in (False, True) for pair in synthetic(made, grad=grad)]
    found = calibrating.fit_cost(kernel, measured, threads=THREADS, source="here")
    assert (found.threads, found.source) == (THREADS, "here")
    fitted = replace(kernel, costs={"cpu": found})
    half, most = calibrating.errors_of(fitted, measured)
    assert half <= most < 0.01
    assert found.call == pytest.approx(true.call, rel=0.05)
    assert found.with_backward.pair == pytest.approx(both.pair, rel=0.1)
    assert calibrating.errors_of(kernel, measured)[0] > 0.05  # those that it ships are others


def test_constants_that_no_problem_tells_of_stay_as_they_were():
    kernel = registry.kernel("torch/tiled")  # takes no dense mask
    old = replace(kernel.cost("cpu"), mask=7e-9)
    kernel = replace(kernel, costs={"cpu": old})
    found = calibrating.fit_cost(kernel, synthetic(kernel, grad=False), threads=1, source="")
    assert found.mask == 7e-9


def test_problems_are_the_same_every_time_short_and_long_and_of_every_kind_that_the_kernel_takes():
    for name, kinds in {
        "torch/flash": {"none", "causal", "boolean mask", "additive mask", "one query", "one query, boolean mask"},
        "torch/tiled": {"none", "causal", "window", "neighborhood", "segments", "one query"},
    }.items():
        cases = calibrating.cases_for(registry.kernel(name), grad=True)
        assert [str(each.problem) for each in cases] == [
            str(each.problem) for each in calibrating.cases_for(registry.kernel(name), grad=True)
        ]
        assert {each.kind for each in cases} == kinds
        assert len(cases) > 16
        lengths = [each.problem.seqlen_kv for each in cases]
        assert min(lengths) <= 64
        assert max(lengths) >= 400
        assert all(each.problem.requires_grad for each in cases)


def test_what_a_kernel_takes_per_key_is_told_apart_from_what_it_takes_per_pair():
    kernel = registry.kernel("torch/flash")
    true = Cost(call=2e-5, pair_dim=5e-11, pair=6e-10, token_dim=2e-9, token=8e-8, mask=2e-10, element=2e-9)
    made = replace(kernel, costs={"cpu": replace(true, threads=THREADS)})
    found = calibrating.fit_cost(kernel, synthetic(made, grad=False), threads=THREADS, source="here")
    assert found.token_dim == pytest.approx(true.token_dim, rel=0.05)
    assert found.pair == pytest.approx(true.pair, rel=0.05)


def test_problems_of_one_query_have_one_query_and_many_keys():
    cases = calibrating.cases_for(registry.kernel("torch/flash"), grad=False)
    decoding = [each.problem for each in cases if each.kind in calibrating.OF_ONE_QUERY]
    assert len(decoding) >= 6
    assert {problem.seqlen_q for problem in decoding} == {1}
    assert max(problem.seqlen_kv for problem in decoding) >= 400


def test_measuring_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    calibrating.cases_for(registry.kernel("torch/flash"), grad=False, count=4)
    assert torch.equal(torch.rand(2), expected)


def test_a_kernel_without_a_backward_has_no_problems_with_one():
    assert calibrating.cases_for(registry.kernel("torch/flex"), grad=True) == []


def test_every_problem_of_a_kernel_runs_by_it_and_is_measured():
    kernel = registry.kernel("torch/math")
    cases = calibrating.cases_for(kernel, grad=True, count=4, longest=1e-3)
    calls = [each.prepared(kernel.name) for each in cases]
    assert all(gradient is not None for gradient in calls[0]())
    taken = calibrating.least_times(calls, budget=0.0)
    assert len(taken) == len(cases)
    assert all(seconds > 0 for seconds in taken)


# What a kernel visits


def test_a_kernel_that_counts_its_work_is_estimated_by_it():
    cost = Cost(call=1.0, pair=2.0, part=10.0)
    kernel = toy(costs={"cpu": cost}, work=lambda problem: Work(pairs=100.0, parts=3.0))
    for bias in (None, Window(1, 0)):
        asked = problem(bias=bias)
        assert kernel.terms(asked).seconds(asked) == pytest.approx(1.0 + 3 * 10.0 + asked.num_heads * 100.0 * 2.0)


def test_without_work_all_pairs_count_or_those_that_the_mask_leaves():
    cost = Cost(call=0.0, pair=1.0)
    window = problem(bias=Window(1, 0))
    everything, kept = toy(costs={"cpu": cost}), toy(costs={"cpu": cost}, skips={Window})
    assert everything.terms(window).seconds(window) == 4 * 64 * 64
    assert kept.terms(window).seconds(window) == 4 * window.pairs_left() == 4 * (64 + 63)


def test_work_that_raises_is_a_reason_against_the_kernel_and_fails_no_call():
    def work(problem):
        raise ZeroDivisionError("no tiles")

    with register(toy(work=work, costs={"cpu": Cost(call=0.0)})):
        verdict = explain_problem(problem())["toy/steady"]
        assert verdict.refused_fields == ("work",)
        assert "its own count of pairs raised ZeroDivisionError: no tiles" in verdict.reasons[0]
        x = torch.ones(1, 4, 2, 8)
        assert attention(x, x, x).shape == x.shape


def test_constants_of_forward_and_backward_together_replace_the_factor():
    nested = Cost(call=7.0, pair=3.0)
    kernel = toy(costs={"cpu": Cost(call=1.0, backward=2.0, with_backward=nested)})
    forward, both = problem(), problem(requires_grad=True)
    assert kernel.terms(forward).seconds(forward) == 1.0
    assert kernel.terms(both).seconds(both) == 7.0 + 3.0 * 4 * 64 * 64


def test_with_other_threads_work_scales_and_the_fixed_part_does_not():
    cost = Cost(call=1.0, pair=1.0, part=5.0, threads=8)
    asked = problem()
    kernel = toy(costs={"cpu": cost}, work=lambda problem: Work(pairs=10.0, parts=1.0))
    assert kernel.terms(asked).seconds(asked) == pytest.approx(1.0 + 5.0 + 40.0 * 8 / THREADS)


def test_writing_out_a_bias_costs_what_its_kind_takes():
    rates = Rates(
        call=1.0, copy=0.0, written={"Causal": Written(call=10.0, element=0.0), "*": Written(call=99.0, element=0.0)}
    )
    causal, window = Causal("top-left"), Window(2, 2)
    assert rates.of_kind(causal).call == 10.0
    assert rates.of_kind(window).call == 99.0
    assert rates.of_kind(causal & window).call == 109.0
    assert shipped_rates("cpu").written
    assert shipped_rates("xpu") is shipped_rates("*")


# The file


FULL = {
    "costs": {
        "torch/flash": Cost(call=1e-5, pair=2e-9, with_backward=Cost(call=3e-5, backward=0.0)),
        "torch/math": Cost(call=4e-5),
    },
    "rates": Rates(call=1e-6, copy=2e-10, written={"Window": Written(call=3e-6, element=4e-10)}),
}


def test_what_is_written_is_read_again(file):
    given = calibration(**FULL)
    write_costs(file, given)
    found = read_costs(file)
    assert as_data(found) == as_data(given)
    cost = found.costs["torch/flash"]
    assert (cost.call, cost.pair, cost.with_backward.call) == (1e-5, 2e-9, 3e-5)
    assert cost.source == found.rates.source == given.source
    assert cost.threads == cost.with_backward.threads == found.rates.threads == THREADS
    assert device_name() in cost.source


def test_no_file_is_no_error(file):
    assert read_costs(file) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_core.refresh()
        assert explain_problem(problem()).chosen == "torch/flash"


def test_a_file_is_written_whole_or_not_at_all(file, monkeypatch):
    write_costs(file, calibration(**FULL))
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_costs(file, calibration())
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def changed(**given):
    data = as_data(calibration(**FULL))
    data.update(given)
    return json.dumps(data)


def with_constants(**given):
    data = as_data(calibration(**FULL))
    data["devices"]["cpu"]["kernels"]["torch/flash"] = given
    return json.dumps(data)


UNUSABLE = {
    "not JSON": ("{", "it is no file of costs"),
    "not an object": ("[]", "it is no file of costs"),
    "deeply nested": ("[" * 100_000, "it is no file of costs"),
    "not text": (b"\xff\xfe\x00", "it cannot be read"),
    "another format": (changed(format=2), "its format is 2, and this attn-core reads format 1"),
    "another torch": (changed(torch="1.0"), "it was measured with torch 1.0, and this is torch"),
    "no device": (changed(devices={}), "it is no file of costs: KeyError"),
    "unknown constant": (with_constants(call=1.0, magic=2.0), "Cost has no constant 'magic'"),
    "negative": (with_constants(call=-1.0), "call must be a number of seconds, got -1.0"),
    "not finite": (with_constants(call=1.0, pair=float("nan")), "pair must be a number of seconds, got nan"),
    "text for a number": (with_constants(call="fast"), "call must be a number of seconds, got 'fast'"),
    "no call": (with_constants(pair=1.0), "Cost lacks call"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_broken_or_foreign_file_costs_one_warning_and_the_doctor_says_why(file, case):
    text, reason = UNUSABLE[case]
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnusableFileError, match=None) as caught:
        read_costs(file)
    assert reason in str(caught.value)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attn_core.refresh()
        sources = {verdict.source for verdict in explain_problem(problem()) if verdict.source}
        explain_problem(problem(32))
    told = [str(each.message) for each in seen if each.category is CalibrationWarning]
    assert len(told) == 1
    assert reason in told[0]
    assert str(file) in told[0]
    assert not any("calibrated" in source for source in sources)
    findings = json.loads(attn("doctor", "--json"))["findings"]
    (finding,) = [each for each in findings if each["what"] == "costs"]
    assert finding["name"] == str(file)
    assert finding["state"] == "ignored"
    assert reason in finding["reason"]
    assert finding["fix"] == "attn calibrate"


def test_a_file_of_another_machine_is_ignored(file):
    write_costs(file, calibration(name="a PDP-11", **FULL))
    with pytest.raises(UnusableFileError, match="it was measured on a PDP-11, and this is"):
        read_costs(file)
    attn_core.refresh()
    with pytest.warns(CalibrationWarning, match="PDP-11"):
        registry.load()
    assert registry.calibration is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ATTN_COSTS": "here/costs.json"}, "here/costs.json"),
        ({"ATTN_COSTS": ""}, None),
        ({"ATTN_COSTS": "  "}, None),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/attn/costs.json"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/attn/costs.json"),
        ({"HOME": "/home/me"}, "/home/me/.cache/attn/costs.json"),
    ],
    ids=["named", "none", "blank", "XDG", "XDG must be absolute", "home"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have other caches")
def test_where_the_file_is(monkeypatch, variables, expected):
    from attn_core.environment import path_of_costs, read_environment

    for name in ("ATTN_COSTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = path_of_costs(read_environment())
    assert (None if found is None else str(found)) == expected


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("darwin", "Library/Caches/attn/costs.json"), ("win32", "AppData/Local/attn/Cache/costs.json")],
)
def test_where_the_file_is_elsewhere(monkeypatch, platform, expected):
    from attn_core.environment import path_of_costs, read_environment

    for name in ("ATTN_COSTS", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert path_of_costs(read_environment()).as_posix().endswith(expected)


# What measured constants change


SLOW_FLASH = {"costs": {"torch/flash": Cost(call=9.0, with_backward=Cost(call=99.0))}}


def test_measured_constants_change_the_choice_and_explain_says_so(file):
    assert explain_problem(problem()).chosen == "torch/flash"
    write_costs(file, calibration(**SLOW_FLASH))
    attn_core.refresh()
    told = explain_problem(problem())
    assert told.chosen == "torch/math"
    assert told["torch/flash"].seconds == 9.0
    assert told["torch/flash"].source == f"calibrated: {device_name()}, {_threads(THREADS)}"
    assert explain_problem(problem(requires_grad=True))["torch/flash"].seconds == 99.0
    assert "calibrated" not in told["torch/math"].source
    assert "note: calibrated on this machine: the constants of torch/flash" in str(told)
    assert json.loads(attn("doctor", "--json"))["environment"]["estimates"].startswith(f"calibrated ({file})")


def _threads(count):
    return "1 thread" if count == 1 else f"{count} threads"


def test_the_constants_are_read_at_the_first_choice_and_not_at_the_import(file):
    write_costs(file, calibration(**SLOW_FLASH))
    code = """
import sys, attn_core
assert not any(name in sys.modules for name in ("attn_core.costs_file", "attn_core.calibration"))
import torch
x = torch.ones(1, 4, 2, 8)
print(attn_core.plan(x, x, x).kernel)
assert "attn_core.calibration" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "torch/math", ended.stderr


def test_choices_that_were_kept_are_made_anew_by_new_constants():
    query = torch.ones(1, 4, 2, 8)
    assert attn_core.plan(query, query, query).kernel == "torch/flash"
    with attn_core.record() as calls:
        attention(query, query, query)
        generation = registry.generation
        registry.use_costs(calibration(**SLOW_FLASH))
        assert registry.generation > generation
        attention(query, query, query)
        registry.use_costs(None)
        attention(query, query, query)
    assert {row.kernel: row.calls for row in calls} == {"torch/flash": 2, "torch/math": 1}


def test_a_compiled_function_chooses_anew_by_new_constants():
    query = torch.randn(1, 4, 2, 8)
    kernels = []

    def backend(graph, inputs):
        kernels.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: attention(x, x, x), backend=backend, fullgraph=True)
    compiled(query)
    registry.use_costs(calibration(**SLOW_FLASH))
    compiled(query)
    assert "flash" in kernels[0]
    assert len(kernels) == 2
    assert "flash" not in kernels[1]


def test_a_kernel_registered_later_gets_its_constants_and_can_be_taken_out(file):
    write_costs(file, calibration(costs={"toy/steady": Cost(call=2.0)}))
    attn_core.refresh()
    kernel = toy()
    with register(kernel):
        assert explain_problem(problem())["toy/steady"].seconds == 2.0
        registry.use_costs(None)
        assert explain_problem(problem())["toy/steady"].seconds == 1.0
        assert registry.kernel("toy/steady") is kernel
    assert not attn_core.is_available("toy/steady")


def test_measured_rates_count_in_what_an_adaptation_costs():
    asked = problem(bias=Window(3, 3), compiling=True)  # outside a graph the dense form is kept
    before = explain_problem(asked)["torch/flash"].seconds
    registry.use_costs(calibration(rates=Rates(call=0.0, copy=0.0, written={"Window": Written(call=5.0, element=0.0)})))
    assert explain_problem(asked)["torch/flash"].seconds == pytest.approx(before + 5.0, abs=0.01)


def test_a_dense_form_that_is_kept_costs_a_call_and_one_that_is_too_large_its_elements():
    rates = Rates(call=1.0, copy=0.0, written={"Window": Written(call=0.0, element=1.0)})
    registry.use_costs(calibration(rates=rates, costs={"torch/math": Cost(call=0.0)}))
    for seqlen, expected in ((64, 1.0), (8192, 8192.0**2)):
        assert explain_problem(problem(seqlen, bias=Window(3, 3)))["torch/math"].seconds == pytest.approx(expected)


def test_a_set_but_empty_variable_leaves_the_shipped_constants(file, monkeypatch):
    write_costs(file, calibration(**SLOW_FLASH))
    monkeypatch.setenv("ATTN_COSTS", "")
    attn_core.refresh()
    assert explain_problem(problem()).chosen == "torch/flash"


# The command


@pytest.fixture
def quick(monkeypatch):
    """Measures nothing: times are what these constants say."""
    true = Cost(call=1e-3, pair=1e-9, threads=THREADS)

    def prepared(each, kernel):
        as_true = replace(registry.kernel(kernel), costs={"cpu": true})
        return as_true.terms(each.problem).seconds(each.problem)

    monkeypatch.setattr(calibrating.Case, "prepared", prepared)
    monkeypatch.setattr(
        calibrating,
        "least_times",
        lambda calls, budget, tell: [each if isinstance(each, float) else 1e-5 for each in calls],
    )
    monkeypatch.setattr(calibrating, "PROBLEMS", 8)


def test_calibrate_writes_what_the_next_process_reads(file, quick):
    output = attn("calibrate", "--kernels", "torch/math")
    assert str(file) in output
    assert "torch/math" in output
    assert "how far estimates are off" in output
    assert read_costs(file).costs["torch/math"].call == pytest.approx(1e-3, rel=0.05)
    attn_core.refresh()
    assert "calibrated" in explain_problem(problem())["torch/math"].source


def test_a_part_of_the_kernels_leaves_the_others_as_they_were_measured(file, quick):
    write_costs(file, calibration(**SLOW_FLASH))
    attn("calibrate", "--kernels", "torch/math")
    assert set(read_costs(file).costs) == {"torch/flash", "torch/math"}
    assert read_costs(file).costs["torch/flash"].call == 9.0


def test_a_dry_run_writes_nothing(file, quick):
    output = attn("calibrate", "--kernels", "torch/math", "--dry-run")
    assert "nothing was written" in output
    assert not file.exists()


def test_out_names_another_file(file, tmp_path, quick):
    attn("calibrate", "--kernels", "torch/math", "--out", str(tmp_path / "mine.json"))
    assert set(read_costs(tmp_path / "mine.json").costs) == {"torch/math"}
    assert not file.exists()


def test_json_is_what_is_written(file, quick):
    assert json.loads(attn("calibrate", "--kernels", "torch/math", "--json")) == json.loads(file.read_text())


def test_forget_removes_the_file_and_twice_is_no_error(file):
    write_costs(file, calibration(**SLOW_FLASH))
    attn_core.refresh()
    assert explain_problem(problem()).chosen == "torch/math"
    assert f"removed {file}" in attn("calibrate", "--forget")
    assert not file.exists()
    assert explain_problem(problem()).chosen == "torch/flash"
    assert f"there is no {file}" in attn("calibrate", "--forget")


def test_with_an_empty_variable_there_is_nowhere_to_write(monkeypatch):
    monkeypatch.setenv("ATTN_COSTS", "")
    assert "ATTN_COSTS is set, but empty" in attn("calibrate", exit_code=2)


def test_a_pattern_that_no_kernel_matches_is_an_error():
    with pytest.raises(InputError, match=r"no kernel that matches 'torch/flush'"):
        calibrating.kernels_to_measure("torch/flush")
