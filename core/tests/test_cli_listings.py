"""`attn kernels`, `attn plugins` and `attn doctor` say what is declared, what was found, and what to do."""

import json
import warnings
from dataclasses import fields

import attn_core
import pytest
import torch
from attn_core import Backward, Capabilities, Causal, Kernel, TensorBias, Unusable, Window, refresh, register
from attn_core.cli import main
from attn_core.cli.declared import plain, remaining
from attn_core.testing import HELLO, fake_distribution, importable
from click.testing import CliRunner

VARIABLES = ("ATTN_PLUGINS", "ATTN_BLOCK", "ATTN_PREFER", "ATTN_ALLOW")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`, and no ATTN_* variable; afterwards the registry is as it was."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with importable(tmp_path) as folder:
        refresh()
        yield folder
    monkeypatch.undo()
    refresh()


def attn(*arguments, exit_code=0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.output


def run(query, key, value, *, bias=None, scale, softcap=None, dropout_p=0.0, return_lse=False):
    raise AssertionError("only declared here")


#: Every field away from its default.
EVERYTHING = Capabilities(
    devices={"cpu", "cuda"},
    dtypes={torch.float32, torch.bfloat16},
    head_dims=range(16, 257, 16),
    head_dims_v=frozenset({32, 64}),
    biases={Causal("bottom-right"), Window},
    backward=Backward(
        dtypes={torch.bfloat16},
        head_dims=range(32, 129, 32),
        head_dims_v=frozenset({48}),
        biases={TensorBias},
        gqa=True,
        bias_grad=True,
        lse_grad=True,
        deterministic=True,
        double=True,
        min_compute_capability=(9, 0),
    ),
    gqa=True,
    softcap=True,
    dropout=True,
    return_lse=True,
    deterministic=True,
    batch_invariant=True,
    forward_ad=True,
    compile=True,
    strided_head_dim=True,
    empty_lengths=True,
    min_compute_capability=(8, 0),
    max_compute_capability=(12, 1),
    numerics="approximate",
)
BARE = Capabilities(devices={"xpu"}, dtypes={torch.float16}, head_dims={64})


def kernel(**changes):
    return Kernel(**{"name": "mine/all", "run": run, "capabilities": EVERYTHING, **changes})


# attn kernels


def test_the_example_declares_every_field_that_there_is():
    for record in (EVERYTHING, EVERYTHING.backward):
        for field in fields(record):
            assert getattr(record, field.name) != field.default, f"{field.name} is as by default; give it a value"


def test_the_table_shows_every_field_that_a_kernel_declares():
    with register(kernel()):
        output = attn("kernels", "mine/*")
    for word in (*remaining(EVERYTHING, {"devices", "dtypes", "head_dims", "biases", "backward"}), "devices cpu, cuda"):
        assert word in output
    for word in remaining(EVERYTHING.backward):
        assert word in output
    for field in (*fields(EVERYTHING), *fields(EVERYTHING.backward)):
        assert field.name in output, field.name
    assert "sm_121" in output
    assert 'biases Causal("bottom-right"), Window' in output


def test_the_table_leaves_out_what_is_not_declared():
    with register(kernel(capabilities=BARE)):
        output = attn("kernels", "mine/*")
    assert "devices xpu" in output
    assert "gqa" not in output
    assert "deterministic" not in output


def test_the_json_has_every_field():
    with register(kernel(capabilities=(EVERYTHING, BARE))):
        (mine,) = json.loads(attn("kernels", "mine/*", "--json"))
    first, second = mine["capabilities"]
    assert set(first) == set(second) == {field.name for field in fields(Capabilities)}
    assert set(first["backward"]) == {field.name for field in fields(Backward)}
    assert first["head_dims"] == {"from": 16, "to": 256, "step": 16}
    assert first["head_dims_v"] == [32, 64]
    assert first["dtypes"] == ["bfloat16", "float32"]
    assert first["biases"] == ['Causal("bottom-right")', "Window"]
    assert first["min_compute_capability"] == [8, 0]
    assert second["backward"] is None
    assert (mine["layout"], mine["state"]) == ("heads-last", "ready")


def test_the_json_lists_the_kernels_that_python_lists():
    names = [each["kernel"] for each in json.loads(attn("kernels", "--json"))]
    assert names == [each.name for each in attn_core.kernels()]


def test_a_kernel_has_a_row_for_each_group_of_devices():
    output = attn("kernels", "torch/flash")
    assert output.count("│ torch/flash ") == 2
    assert "devices cpu" in output
    assert "devices cuda" in output


def test_brackets_are_text():
    missing = Unusable("absent", "attn-x is not there", 'pip install "attn-x[fa2]"')
    with register(kernel(probe=lambda: missing)):
        assert 'pip install "attn-x[fa2]"' in attn("doctor")


def test_a_pattern_without_kernels_is_an_error_with_near_names():
    output = attn("kernels", "torch/flsh", exit_code=2)
    assert output.startswith("Error: no kernel matches 'torch/flsh'. Did you mean 'torch/flash'")


def test_nothing_is_cut_off_where_nobody_watches_a_terminal():
    name = f"mine/{'long-' * 40}name"
    with register(kernel(name=name)):
        output = attn("kernels", "mine/*")
    assert name in output
    assert "…" not in output.replace("16, 32, …", "").replace("32, 64, …", "")


def test_plain_data_keeps_what_json_knows_and_names_the_rest():
    assert plain({torch.float32, torch.bfloat16}) == ["bfloat16", "float32"]
    assert plain(Causal) == "Causal"
    assert plain((8, 6)) == [8, 6]
    assert plain(range(0)) == {"from": 0, "to": None, "step": 1}


# attn plugins


def test_plugins_are_listed_with_their_distribution(site):
    fake_distribution(site)
    refresh()
    output = attn("plugins")
    for word in ("hello", "ready", "attn-hello 1.0", "attn_hello", "hello/sdpa", "torch/math"):
        assert word in output


def test_plugins_as_json_have_states_and_reasons(site, monkeypatch):
    fake_distribution(site)
    fake_distribution(site, "attn-bad", source="1 / 0", entry_points={"bad": "attn_bad"})
    fake_distribution(site, "attn-old", source=HELLO, entry_points={"old": "attn_old"}, requires=["attn-core<0.1"])
    monkeypatch.setenv("ATTN_BLOCK", "hello")
    refresh()
    with pytest.warns(attn_core.PluginWarning):
        attn_core.plugins()
    found = {plugin["name"]: plugin for plugin in json.loads(attn("plugins", "--json"))}
    states = {"bad": "broken", "hello": "unavailable", "old": "broken", "torch": "ready"}
    assert {name: found[name]["state"] for name in states} == states
    assert found["bad"]["reason"].startswith("ZeroDivisionError")
    assert found["hello"]["reason"] == "blocked by ATTN_BLOCK"
    assert found["old"]["fix"].startswith("pip install")
    assert found["hello"]["distribution"] == "attn-hello"
    assert found["hello"]["version"] == "1.0"
    assert found["hello"]["entry_point"] == "attn_hello"


# attn doctor


def findings(exit_code=0):
    """(what, name) -> finding. Warnings are said before: beside the JSON, they would be in its way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attn_core.PluginWarning)
        attn_core.plugins()
    report = json.loads(attn("doctor", "--json", exit_code=exit_code))
    return {(finding["what"], finding["name"]): finding for finding in report["findings"]}


def test_the_doctor_tells_the_environment(site, monkeypatch):
    monkeypatch.setenv("ATTN_PREFER", "torch/*")
    output = attn("doctor")
    for word in ("attn-core", torch.__version__, "Python", "operating system", "GPUs", "threads", "'torch/*'"):
        assert word in output


def test_a_healthy_installation_exits_with_0(site):
    assert {finding["state"] for finding in findings().values()} <= {"unavailable", "absent"}


def test_a_broken_plugin_exits_with_1_and_says_what_to_type(site):
    fake_distribution(site, "attn-bad", source="1 / 0", entry_points={"bad": "attn_bad"})
    refresh()
    found = findings(exit_code=1)["plugin", "bad"]
    assert found["state"] == "broken"
    assert "pip install -U attn-bad" in found["fix"]
    assert "ATTN_BLOCK=bad" in found["fix"]


def test_a_broken_command_exits_with_1(site):
    fake_distribution(site, "attn-x", source="1 / 0", entry_points={"x": "attn_x:x"}, group="attn.commands")
    assert findings(exit_code=1)["command", "x"]["reason"].startswith("ZeroDivisionError")


def test_a_kernel_whose_library_is_absent_is_told_with_its_fix_and_is_no_failure(site):
    with register(kernel(probe=lambda: Unusable("absent", "no library", "pip install lib"))):
        found = findings()["kernel", "mine/all"]
    assert (found["state"], found["reason"], found["fix"]) == ("absent", "no library", "pip install lib")


def test_a_kernel_whose_probe_raises_is_broken(site):
    with register(kernel(probe=lambda: 1 / 0)):
        assert findings(exit_code=1)["kernel", "mine/all"]["state"] == "broken"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ATTN_PERFER", "torch/math", "attn reads no such variable. Did you mean 'ATTN_PREFER'"),
        ("ATTN_PREFER", "torch/mth", "no kernel matches 'torch/mth'. Did you mean 'torch/math'"),
        ("ATTN_BLOCK", "flsh", "no plugin 'flsh' is installed"),
        ("ATTN_PLUGINS", "torch,flsh", "no plugin 'flsh' is installed"),
    ],
)
def test_a_variable_without_effect_is_told(site, monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    found = findings()["variable", variable]
    assert found["state"] == "ignored"
    assert reason in found["reason"]


def test_a_variable_that_cannot_be_read_is_a_message(site, monkeypatch):
    monkeypatch.setenv("ATTN_ALLOW", "bogus")
    assert attn("doctor", exit_code=2) == "Error: ATTN_ALLOW: takes approximate, known-bad; got 'bogus'\n"


def test_the_doctor_prints_findings_as_a_table(site):
    fake_distribution(site, "attn-bad", source="1 / 0", entry_points={"bad": "attn_bad"})
    refresh()
    assert "ZeroDivisionError" in attn("doctor", exit_code=1)
