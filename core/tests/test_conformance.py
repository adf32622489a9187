"""The conformance kit: a right kernel passes, each saboteur is caught by the check that it is for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import (
    ALiBi,
    Backward,
    BlockMask,
    Cached,
    Capabilities,
    Causal,
    InputError,
    InputTypeError,
    Intersection,
    Kernel,
    KeyPadding,
    Neighborhood,
    Paged,
    PrefixLM,
    RelPosTable,
    Segments,
    Sum,
    TensorBias,
    UnknownKernelError,
    Window,
)
from attn_core.cli import main
from attn_core.conformance import CHECKS, CheckResult, check_kernel
from attn_core.conformance.cases import claimed_cases
from attn_core.conformance.certificate import certificate, read, strangeness, write
from attn_core.conformance.isolated import check_isolated, waited_for_a_core
from attn_core.testing import HELLO, fake_distribution, importable
from click.testing import CliRunner


def load(name):
    """A module beside this one; pytest imports tests without their folder on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


streams_doubled = load("streams_doubled")
rude_plugins = load("rude_plugins")
saboteurs = load("saboteurs")


#: Those that can be declared and stand for themselves.
KINDS = (ALiBi, BlockMask, Cached, Causal, Intersection, KeyPadding, Neighborhood, Paged, PrefixLM, RelPosTable)
KINDS += (Segments, Sum, TensorBias, Window)
#: On one key, these are simpler ones, or none.
NOTHING_ON_ONE_KEY = (Intersection,)


def told(results):
    return "\n".join(str(result) for result in results if not result)


@pytest.fixture(scope="module")
def of_the_good():
    return check_kernel(saboteurs.GOOD)


def test_a_right_kernel_passes_every_check(of_the_good):
    assert all(of_the_good), told(of_the_good)
    passed = {result.check for result in of_the_good if result.status == "passed"}
    manners = {name for name, check in CHECKS.items() if check.group == "manners"}
    undeclared = {
        *("entries_do_not_depend_on_each_other", "can_be_traced", "runs_in_the_current_stream"),
        *("pushes_derivatives_forward", "is_differentiable_twice"),
    }
    assert passed == set(CHECKS) - manners - undeclared, "else none is caught"


def test_a_right_kernel_passes_the_checks_of_what_few_declare():
    few = replace(saboteurs.CLAIMS, forward_ad=True, backward=replace(saboteurs.CLAIMS.backward, double=True))
    kernel = replace(saboteurs.GOOD, capabilities=replace(few, batch_invariant=True, compile=True))
    for check in ("entries_do_not_depend_on_each_other", "pushes_derivatives_forward", "is_differentiable_twice"):
        results = check_kernel(kernel, only=check)
        assert {result.status for result in results} >= {"passed"}, check
        assert all(results), told(results)


def test_every_check_catches_somebody():
    assert {saboteur.caught_by for saboteur in saboteurs.SABOTEURS.values()} == set(CHECKS)


def test_a_kernel_is_held_to_what_it_declares_once_it_was_weighed():
    """Some declare more exactly when their library is imported, which a probe may do."""
    imported = []

    class Lazy(Kernel):
        @property
        def declarations(self):
            [declared] = super().declarations
            return (replace(declared, head_dims=frozenset({32})) if imported else declared,)

    good = {field.name: getattr(saboteurs.GOOD, field.name) for field in fields(Kernel)}
    kernel = Lazy(**good | {"name": "toy/lazy", "probe": lambda: imported.append("library")})
    [result] = check_kernel(kernel, only="takes_what_it_claims")
    assert result.status == "passed", result
    sizes = {case.problem.head_dim for case in claimed_cases(kernel, "cpu")}
    assert (imported, sizes) == (["library"], {32})


def test_a_right_kernel_that_reads_pages_prefixes_and_blocks_passes_every_check():
    results = check_kernel(saboteurs.GOOD_RARE)
    assert all(results), told(results)
    proven = {result.proves for result in results if result.status == "passed"}
    assert proven >= {"biases: Paged", "biases: PrefixLM", "biases: BlockMask"}
    in_pages = {result.case for result in results if result.check == "agrees" and "Paged" in result.case}
    assert {size for size in (1, 16, 64, 128, 256) if any(f"pages of {size}>" in case for case in in_pages)} == {
        *(1, 16, 64, 128, 256)
    }


def test_a_right_kernel_runs_in_the_current_stream_of_a_double():
    with streams_doubled.doubled_streams():
        [result] = check_kernel(saboteurs.GOOD, only="runs_in_the_current_stream")
    assert result.status == "passed", result
    [result] = check_kernel(saboteurs.GOOD, only="runs_in_the_current_stream")
    assert (result.status, result.reason) == ("skipped", "cpu has no streams")


def test_the_double_of_streams_keeps_what_is_queued_in_one_that_sleeps_until_it_is_waited_for():
    with streams_doubled.doubled_streams() as streams:
        early, late = torch.zeros(3), torch.zeros(3)
        with streams.stream(streams.Stream()):
            streams._sleep(1)
            late.add_(torch.ones(3))
            doubled = 2 * late.view(3)
            with streams.stream(streams.default_stream()):
                early.copy_(late)
        assert early.tolist() == [0.0] * 3, "read before it was written"
        assert late.tolist() == [0.0] * 3
        streams.synchronize()
        assert (late.tolist(), doubled.tolist()) == ([1.0] * 3, [2.0] * 3)
        with streams.stream(streams.Stream()):
            streams._sleep(1)
            assert late.add_(1.0).sum().item() == 6.0, "who asks for a number waits for it"


@pytest.mark.parametrize("name", saboteurs.SABOTEURS)
def test_a_saboteur_is_caught_by_the_check_for_it(name):
    saboteur = saboteurs.SABOTEURS[name]
    results = saboteur.finds(saboteur.caught_by)
    assert not all(results), f"{saboteur.caught_by} finds nothing wrong where {name}"
    assert all(result.reason for result in results if result.status != "passed")


HONESTY = [name for name, check in CHECKS.items() if check.group == "honesty"]


@pytest.mark.parametrize("check", HONESTY)
@pytest.mark.parametrize("name", ["torch/flash", "torch/flex", "torch/math", "torch/reference", "torch/tiled"])
def test_a_built_in_kernel_says_what_it_takes_and_refuses_the_rest(name, check):
    results = check_kernel(name, only=check)
    assert all(results), told(results)
    assert results


def test_every_field_that_can_be_declared_has_a_check():
    checked = {field for check in CHECKS.values() if check.group in ("numbers", "contract") for field in check.fields}
    names = [field.name for field in fields(Capabilities)]
    names += [field.name for field in fields(Backward) if field.name in ("bias_grad", "lse_grad")]
    names += [f"backward.{name}" for name in ("dtypes", "head_dims", "head_dims_v", "biases", "gqa")]
    names += [f"backward.{name}" for name in ("deterministic", "double", "min_compute_capability")]
    assert len(names) == len(fields(Capabilities)) + len(fields(Backward))
    assert not set(names) - checked


@pytest.mark.parametrize("field", ["backward.gqa", "backward.head_dims_v"])
def test_what_the_backward_alone_lacks_must_be_refused_there_by_its_name(field):
    backward = Backward(gqa=False, head_dims_v=range(1, 65), bias_grad=True, lse_grad=True)
    declared = replace(saboteurs.CLAIMS, head_dims_v=range(1, 129), gqa=True, backward=backward)

    class Forgetful(Kernel):
        def refusals(self, problem, **given):
            return [refusal for refusal in super().refusals(problem, **given) if refusal.field != field]

    honest, forgetful = (of(name="toy/k", run=saboteurs.attend, capabilities=declared) for of in (Kernel, Forgetful))
    [result] = check_kernel(honest, only="refuses_what_it_does_not_claim")
    assert result.status == "passed", result
    [result] = check_kernel(forgetful, only="refuses_what_it_does_not_claim")
    assert f"{field} is not declared" in result.reason
    # The forward has it, so it is asked for there.
    asked = [case.problem for case in claimed_cases(honest, "cpu")]
    grouped = [problem for problem in asked if problem.num_kv_heads != problem.num_heads]
    long = [problem for problem in asked if problem.head_dim_v == 128 != problem.head_dim]
    assert grouped
    assert long
    assert not any(problem.requires_grad for problem in grouped + long)


def test_what_is_declared_makes_the_problems():
    narrow = replace(saboteurs.CLAIMS, dtypes={torch.float32}, head_dims=range(8, 65, 8), head_dims_v=None, biases=())
    narrow = replace(narrow, gqa=False, softcap=False, return_lse=False, backward=None, strided_head_dim=False)
    cases = claimed_cases(Kernel(name="good/narrow", run=saboteurs.attend, capabilities=narrow), "cpu")
    problems = [case.problem for case in cases]
    assert {problem.head_dim for problem in problems} >= {8, 16, 64}
    assert all(problem.head_dim % 8 == 0 and problem.head_dim <= 64 for problem in problems)
    assert {problem.dtype for problem in problems} == {torch.float32}
    assert all(problem.num_heads == problem.num_kv_heads and problem.bias is None for problem in problems)
    assert max(problem.seqlen_q for problem in problems) > 65_535
    assert not any(problem.requires_grad or problem.return_lse for problem in problems)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_bias_is_tried_on_one_query_on_two_and_on_one_key(kind):
    capabilities = replace(saboteurs.CLAIMS, biases={kind, *(() if kind is not Sum else (Window, TensorBias))})
    cases = claimed_cases(Kernel(name="good/kind", run=saboteurs.attend, capabilities=capabilities), "cpu")
    lengths = {(c.problem.seqlen_q, c.problem.seqlen_kv) for c in cases if c.proves == f"biases: {kind.__name__}"}
    if kind in (Neighborhood, RelPosTable):  # of as many queries as keys, and of one there is nothing to mask or learn
        assert (7, 7) in lengths
    elif kind is Paged:
        assert (1, 512) in lengths
    else:
        assert {1, 2, 7} <= {seqlen_q for seqlen_q, _ in lengths}
        assert 1 in {seqlen_kv for _, seqlen_kv in lengths} or kind in NOTHING_ON_ONE_KEY


def test_padding_within_blocks_is_tried_where_blocks_are_cut_off():
    kernel = Kernel(
        name="good/blocks", run=saboteurs.attend, capabilities=replace(saboteurs.CLAIMS, biases={BlockMask})
    )
    padded = [case.bias for case in claimed_cases(kernel, "cpu") if case.bias is not None and case.bias.has_padding]
    assert {bias.full is None for bias in padded} == {True, False}
    assert any(bias.lengths[1] % bias.block_size[1] for bias in padded)
    assert any(not bool(bias.valid_keys().all()) for bias in padded)


def test_a_kernel_that_declares_nothing_for_the_device_is_not_judged():
    elsewhere = replace(saboteurs.GOOD, capabilities=replace(saboteurs.CLAIMS, devices={"cuda"}))
    results = check_kernel(elsewhere, device="cpu")
    assert {result.status for result in results} == {"skipped"}
    assert "declares nothing for cpu" in results[0].reason


# In a process of its own


@pytest.fixture
def deadly(tmp_path):
    with saboteurs.deadly_plugin(tmp_path):
        yield


@pytest.mark.parametrize(
    ("name", "how", "limit"),
    [
        ("crashes", "SIGABRT", 60.0),
        ("exits", "exit code 3", 60.0),
        ("hangs", "did not end within 2 s", 2.0),
        ("faults", "an illegal memory access", 60.0),
    ],
)
def test_a_kernel_that_takes_its_process_with_it_costs_a_row(deadly, name, how, limit, monkeypatch):
    monkeypatch.setattr("attn_core.conformance.isolated.DEATHS", 2)
    results = list(check_isolated(f"deadly/{name}", only="agrees", limit=limit))
    assert [how in result.reason for result in results] == [True, True, False]
    assert results[0].case != results[1].case, "the next process goes on behind it"
    assert results[0].problem.startswith("batch 2, seqlen 33")
    assert "2 processes ended" in results[2].reason


BUSY, ASLEEP = "print(flush=True)\nwhile True: pass", "print(flush=True)\nimport time; time.sleep(1000)"


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell who waits for a core")
def test_the_time_in_which_others_have_the_core_is_told_from_sleep():
    programs = {"one": BUSY, "other": BUSY, "asleep": ASLEEP}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # which processes inherit
    try:
        made = {
            name: subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
            for name, program in programs.items()
        }
    finally:
        os.sched_setaffinity(0, cores)
    try:
        for process in made.values():
            process.stdout.read(1)  # it runs
        before = {name: waited_for_a_core(process.pid) for name, process in made.items()}
        time.sleep(2.0)
        waited = {name: waited_for_a_core(process.pid) - before[name] for name, process in made.items()}
    finally:
        for process in made.values():
            process.kill()
            process.communicate()
    assert waited["one"] > 0.3
    assert waited["other"] > 0.3
    assert waited["asleep"] < 0.3
    assert waited_for_a_core(made["asleep"].pid) == 0.0, "it has ended"


def test_in_a_process_of_its_own_the_results_are_the_same():
    inside = check_kernel("torch/math", only="repeats_itself")
    outside = list(check_isolated("torch/math", only="repeats_itself"))
    assert [(r.name, r.status, r.reason) for r in outside] == [(r.name, r.status, r.reason) for r in inside]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"only": "agree"}, "only: no check is named 'agree'. Did you mean 'agrees'"),
        ({"device": "gpu"}, "device: takes a type of device, such as 'cpu' or 'cuda', got 'gpu'"),
        ({"device": "cuda:1"}, "device: nothing can be checked on 'cuda:1': give 'cuda' alone"),
    ],
    ids=["unknown check", "unknown device", "one device of several"],
)
def test_what_the_kit_cannot_do_is_refused_by_the_name_of_the_argument(given, text):
    with pytest.raises(InputError, match=re.escape(text)):
        check_kernel("torch/math", **given)
    with pytest.raises(InputError, match=re.escape(text)):
        next(check_isolated("torch/math", **given))


def test_what_is_no_kernel_cannot_be_checked():
    with pytest.raises(InputTypeError, match="kernel: takes a Kernel or the name of one, got <function"):
        check_kernel(saboteurs.attend)


def test_an_unknown_name_is_an_error_before_anything_runs():
    with pytest.raises(UnknownKernelError, match="Did you mean 'torch/flash'"):
        next(check_isolated("torch/flesh"))


# Certificates


def row(check, status="passed", **more):
    return CheckResult(kernel="good/attend", check=check, case=more.pop("case", ""), status=status, **more)


def test_a_certificate_says_of_each_claim_whether_it_is_shown():
    kernel = saboteurs.GOOD
    results = [
        row("agrees", case="dtype float32", proves="dtypes: float32", error=0.5),
        row("agrees", "failed", case="dtype bfloat16", proves="dtypes: bfloat16", reason="off"),
        row("repeats_itself", "skipped", reason="not today"),
    ]
    made = certificate(kernel, "cpu", results)
    assert made.claims["dtypes: float32"] == "proven"
    assert made.claims["dtypes: bfloat16"] == "failed"
    assert made.claims["deterministic"] == "not testable here"
    assert set(made.claims) >= {"biases: Causal", "gqa", "softcap", "dropout", "head_dims: 64", "backward", "lse_grad"}
    assert not made.granted
    assert made.error == 0.5
    assert "| agrees | dtype bfloat16 | off |" in made.as_markdown()


def test_a_certificate_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made = certificate(saboteurs.GOOD, "cpu", [row("agrees", proves="gqa")])
    paths = write(made, tmp_path)
    assert [path.name for path in paths] == ["good-attend.cpu.json", "good-attend.cpu.md"]
    data = json.loads(paths[0].read_text())
    assert (data["granted"], data["kernel"], data["machine"]["torch"]) == (True, "good/attend", torch.__version__)
    before = {path: path.read_text() for path in paths}
    monkeypatch.setattr(type(made), "as_markdown", lambda self: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write(replace(made, device="cpu", when="later"), tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.fixture
def granted(tmp_path):
    kernel = attn_core.kernels("torch/math")[0]
    return write(certificate(kernel, "cpu", [row("agrees", proves="gqa")]), tmp_path)[0]


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def test_a_certificate_that_is_read_is_the_one_that_was_written_and_holds_where_nothing_has_changed(granted):
    made = read(granted)
    assert {"form": 1, "granted": True, **vars(made)} == json.loads(granted.read_text())
    assert strangeness(made) == []
    done = CliRunner().invoke(main, ["check", "--read", str(granted)])
    assert (done.exit_code, "torch/math on cpu" in done.output) == (0, True), done.output


def test_a_certificate_of_other_versions_says_which(granted):
    machine = json.loads(granted.read_text())["machine"]
    edited(granted, machine=machine | {"torch": "2.1.0"}, version="0.0.1")
    done = CliRunner().invoke(main, ["check", "--read", str(granted)])
    assert done.exit_code == 1
    assert f"torch: 2.1.0 there, {torch.__version__} here" in done.output
    assert "attn-core: 0.0.1 there" in done.output


def test_a_certificate_of_a_kernel_that_failed_or_is_not_here_does_not_hold(granted):
    edited(granted, failures=[row("agrees", "failed", reason="off").as_data()])
    done = CliRunner().invoke(main, ["check", "--read", str(granted)])
    assert done.exit_code == 1
    assert "FAILED 1 rows" in done.output
    edited(granted, kernel="gone/away")
    assert strangeness(read(granted)) == ["gone/away is not installed here"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no JSON", "it is no JSON"),
        ("[]", "it has no form"),
        ('{"form": 99}', "of form 99; this attn-core reads form 1"),
        ('{"form": 1, "kernel": "a/b"}', "it has no distribution, version"),
    ],
    ids=["no JSON", "another file", "a later form", "cut off"],
)
def test_what_is_no_certificate_is_said_to_be_none(text, reason, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, ["check", "--read", str(path)])
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())


# The command, and pytest


@pytest.fixture
def hello(tmp_path):
    with importable(tmp_path / "site"):
        fake_distribution(tmp_path / "site", source=HELLO)
        attn_core.refresh()
        yield
    attn_core.refresh()


def test_the_command_checks_a_plugin_and_writes_its_certificate(hello, tmp_path):
    done = CliRunner().invoke(main, ["check", "hello", "--only", "leaves_its_operands_alone"])
    assert done.exit_code == 0, done.output
    assert "hello/sdpa" in done.output
    done = CliRunner().invoke(main, ["check", "hello/sdpa", "--out", str(tmp_path / "out")])
    data = json.loads((tmp_path / "out" / "hello-sdpa.cpu.json").read_text())
    assert data["distribution"] == "attn-hello"
    assert (done.exit_code, data["granted"]) == (0, True), done.output
    assert set(data["claims"].values()) == {"proven"}
    named = {"dtypes: float32", "head_dims: 8", "head_dims: 256", 'biases: Causal("top-left")'}
    assert data["claims"].keys() >= named
    manners = [data["checks"][name] for name, check in CHECKS.items() if check.group == "manners"]
    assert manners == [{"passed": 1, "failed": 0, "skipped": 0}] * 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check"], "which kernel?"),
        (["check", "torch/flesh"], "Did you mean 'torch/flash'"),
        (["check", "torch/math", "--only", "agree"], "Did you mean 'agrees'"),
        (["check", "torch/math", "--all"], "not both"),
        (["check", "torch/math", "--limit", "0"], "seconds are above 0"),
        (["check", "torch/math", "--limit", "inf"], "86,400 at most, got inf"),
        (["check", "torch/math", "--device", "cudo"], "such as 'cpu' or 'cuda', got 'cudo'. Did you mean 'cuda'"),
        (["check", "torch/math", "--device", "cpu:0"], "give 'cpu' alone"),
        (["check", "torch/math", "--device", "meta"], "it holds no numbers"),
        (["check", "torch/math", "--read", __file__], "--read runs nothing"),
        (["check", "torch/math", "--out", "/dev/null/certificates"], "cannot write into"),
    ],
    ids=[
        *("nothing", "unknown kernel", "unknown check", "both", "no time", "no end"),
        *("unknown device", "one device of several", "no numbers", "run and read", "unwritable"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_arguments(arguments, text):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert text in " ".join(done.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_command_says_that_there_is_no_such_device_and_checks_nothing():
    done = CliRunner().invoke(main, ["check", "--all", "--device", "cuda"])
    assert done.exit_code == 2
    assert "--device: nothing can be checked on 'cuda' here: " in " ".join(done.output.split())
    with pytest.raises(InputError, match="nothing can be checked on 'cuda' here"):
        next(check_isolated("torch/math", device="cuda"))


def test_a_limit_that_is_none_is_an_error_before_anything_runs():
    with pytest.raises(InputError, match="limit: takes seconds above 0, 86,400 at most, got nan"):
        next(check_isolated("torch/math", limit=float("nan")))


def test_the_command_checks_all_that_is_ready_and_says_why_the_rest_is_not(monkeypatch):
    asked = []

    def noted(name, **_):
        asked.append(name)
        return [row("agrees", "passed" if name != "torch/math" else "failed", reason="off")]

    monkeypatch.setattr("attn_core.conformance.isolated.check_isolated", noted)
    done = CliRunner().invoke(main, ["check", "--all"])
    on_cpu = [kernel.name for kernel in attn_core.kernels() if attn_core.is_available(kernel.name)]
    assert [name for name in asked if name.startswith("torch/")] == [n for n in on_cpu if n.startswith("torch/")]
    assert done.exit_code == 1, "torch/math has failed"
    shown = " ".join(done.output.split())
    assert all(kernel.name in shown for kernel in attn_core.kernels("torch/*"))
    assert "failed: good/attend agrees: off" in shown
    if "torch/cudnn" not in on_cpu:
        assert "unavailable" in shown


def test_a_certificate_that_cannot_be_written_after_all_fails_and_the_rest_is_told(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attn_core.conformance.isolated.check_isolated", lambda kernel, **_: [row("agrees")])
    monkeypatch.setattr("attn_core.conformance.certificate.write", full)
    done = CliRunner().invoke(main, ["check", "torch/math", "torch/tiled", "--out", str(tmp_path)])
    assert done.exit_code == 1, done.output
    for name in ("torch/math", "torch/tiled"):
        assert f"cannot write the certificate of {name}: [Errno 28] No space left" in " ".join(done.output.split())
    assert "kernels checked" in done.output


def test_a_kernel_that_declares_another_device_is_listed_and_alone_it_is_not_enough(tmp_path):
    with importable(tmp_path / "site"):
        fake_distribution(tmp_path / "site", source=HELLO.replace('devices={"cpu"}', 'devices={"cuda"}'))
        attn_core.refresh()
        alone = CliRunner().invoke(main, ["check", "hello"])
        beside = CliRunner().invoke(main, ["check", "hello", "torch/math", "--only", "its_reasons_can_be_read"])
    attn_core.refresh()
    assert alone.exit_code == 1, alone.output
    assert "it declares nothing for cpu" in " ".join(alone.output.split())
    assert "nothing was checked" in alone.output
    assert beside.exit_code == 0, beside.output
    assert "it declares nothing for cpu" in " ".join(beside.output.split())


NO_KERNELS = "import attn_core\n@attn_core.hookimpl\ndef attn_kernels():\n    return []\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [(NO_KERNELS, "plugin 'hello' yields no kernels"), ("import nowhere\n", "plugin 'hello' is broken: ")],
    ids=["none are offered", "its import fails"],
)
def test_the_command_says_why_a_plugin_has_no_kernels(tmp_path, source, text):
    with importable(tmp_path / "site"):
        fake_distribution(tmp_path / "site", source=source)
        attn_core.refresh()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attn_core.PluginWarning)
            done = CliRunner().invoke(main, ["check", "hello"])
    attn_core.refresh()
    assert done.exit_code != 0
    assert text in done.output + str(done.exception)


def pytest_run(*arguments, cwd):
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_pytest_runs_the_kit_on_chosen_kernels(tmp_path):
    kit = ["-p", "attn_core.testing.plugin", "--pyargs", "attn_core.conformance"]
    done = pytest_run(*kit, "--attn-kernel", "torch/math", "-k", "repeats_itself", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    done = pytest_run(*kit, "--attn-plugin", "nobody", cwd=tmp_path)
    assert "no kernel of plugin ['nobody']" in done.stdout + done.stderr


def test_pytest_runs_a_test_of_ones_own_on_each_chosen_kernel_and_says_which_they_are(tmp_path):
    (tmp_path / "test_mine.py").write_text("def test_it(attn_kernel):\n    assert attn_kernel.plugin == 'torch'\n")
    mine = ["-v", "-p", "attn_core.testing.plugin", "test_mine.py"]
    done = pytest_run(*mine, "--attn-kernel", "torch/ma*", "--attn-kernel", "torch/ref*", cwd=tmp_path)
    assert "attn: 2 kernels on cpu: torch/math, torch/reference" in done.stdout
    assert "2 passed" in done.stdout
    done = pytest_run(*mine, "--attn-device", "gpu", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--attn-device: takes a type of device, such as 'cpu' or 'cuda', got 'gpu'" in done.stdout + done.stderr
