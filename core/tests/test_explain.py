"""explain(): data first; every kernel not taken has its reasons, also when a slower one was taken."""

import io
import json
import sys

import attn_core
import pytest
import torch
from attn_core import (
    Capabilities,
    Causal,
    Cost,
    InputError,
    InputTypeError,
    Kernel,
    KeyPadding,
    NoKernelError,
    Problem,
    UnknownKernelError,
    Window,
    allow,
    attention,
    explain,
    explain_problem,
    prefer,
    record,
    register,
    scaled_dot_product_attention,
)
from attn_core.registry import Registry
from torch._subclasses.fake_tensor import FakeTensorMode

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
CPU = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})


def run(query, key, value, *, scale):
    return torch.ones_like(query)


def toy(name="toy/a", seconds=0.0, **given):
    costs = {"cpu": Cost(call=seconds, source="a promise")}
    return Kernel(**{"name": name, "run": run, "capabilities": CPU, "costs": costs, **given})


def problem(**given):
    sizes = {"batch": 1, "seqlen_q": 4, "seqlen_kv": 4, "num_heads": 2, "num_kv_heads": 2}
    return Problem(**{**sizes, "head_dim": 8, "head_dim_v": 8, "dtype": torch.float32, "device": "cpu", **given})


# What it says


@pytest.mark.parametrize(
    "bias", [None, Causal(), Window(2, 0), KeyPadding([3]), torch.randn(4, 4)], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
def test_what_is_explained_is_what_runs(bias, return_lse):
    explained = explain(X, X, X, bias, return_lse=return_lse)
    with record() as calls:
        attention(X, X, X, bias, return_lse=return_lse)
    [row] = calls
    assert row.kernel == explained.chosen
    assert row.problem == explained.problem
    assert row.adaptations == explained[row.kernel].adaptations


def test_every_registered_kernel_has_a_verdict():
    with register(toy()):
        explained = explain(X, X, X)
        assert {verdict.kernel for verdict in explained} == {k.name for k in attn_core.kernels()}


def test_the_chosen_comes_first_then_those_that_take_it_by_estimate_then_the_rest_by_name():
    explained = explain(X, X, X, softcap=5.0)
    states = [verdict.state for verdict in explained]
    assert states[0] == "chosen"
    taking = [verdict for verdict in explained if verdict.seconds is not None]
    assert list(explained)[: len(taking)] == taking
    assert [v.seconds for v in taking] == sorted(v.seconds for v in taking)
    rest = [v.kernel for v in list(explained)[len(taking) :]]
    assert rest == sorted(rest) != []


def test_every_kernel_that_does_not_take_it_says_why_also_when_a_slower_one_was_taken():
    with register(toy(seconds=1e-9)):  # faster than any, but without a backward
        x = X.clone().requires_grad_()
        explained = explain(x, x, x)
        assert explained.chosen == "torch/flash"
        assert explained["toy/a"].reasons == ("backward: has no backward, and a gradient is needed",)
        for verdict in explained:
            assert (verdict.seconds is None) == bool(verdict.reasons), verdict.kernel
            assert all(reason and "\n" not in reason for reason in verdict.reasons)


def test_all_reasons_of_a_refusal_are_listed_with_their_fields():
    y = torch.randn(1, 4, 2, 12, dtype=torch.float64)
    with register(toy()):
        verdict = explain(y, y, y, Causal(), softcap=3.0, dropout_p=0.5, return_lse=True)["toy/a"]
    assert verdict.state == "refused"
    assert verdict.refused_fields == ("dtype", "head_dim", "bias", "softcap", "dropout_p", "return_lse")
    assert [reason.partition(":")[0] for reason in verdict.reasons] == list(verdict.refused_fields)
    assert (verdict.seconds, verdict.adaptations) == (None, ())


def test_what_an_adaptation_solves_is_no_reason():
    query, kv = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8)
    with register(toy()):
        assert explain(query, kv, kv)["toy/a"].adaptations == ("expand_kv",)
        refused = explain(query, kv, kv, softcap=3.0)["toy/a"]
    assert refused.refused_fields == ("softcap",)


def test_a_slower_kernel_that_takes_it_is_ready_with_its_estimate():
    explained = explain(X, X, X)
    reference = explained["torch/reference"]
    assert (reference.state, reference.reasons) == ("ready", ())
    assert reference.seconds > explained[explained.chosen].seconds > 0.0


def test_an_unknown_kernel_has_no_verdict():
    with pytest.raises(KeyError, match="toy/nothing"):
        explain(X, X, X)["toy/nothing"]


def test_preferences_of_the_scope_are_shown_and_followed():
    with prefer("torch/reference", "torch/math"):
        explained = explain(X, X, X)
    assert explained.prefer == ("torch/reference", "torch/math")
    assert [v.kernel for v in explained][:2] == ["torch/reference", "torch/math"]
    assert "prefer: torch/reference, torch/math" in str(explained)


def test_explaining_runs_no_kernel_and_takes_meta_tensors():
    def never(query, key, value, *, scale):
        raise AssertionError

    anywhere = Capabilities(devices={"*"}, dtypes={torch.float32}, head_dims={8})
    with register(toy(run=never, capabilities=anywhere, costs={"*": Cost(call=0.0)})):
        assert explain(X, X, X).chosen == "toy/a"
        explained = explain(X.to("meta"), X.to("meta"), X.to("meta"), Causal())
        assert explained.problem.device == "meta"
        assert explained.chosen is not None


# A kernel that the caller insists on


def test_a_forced_kernel_is_the_only_verdict():
    explained = explain(X, X, X, kernel="torch/reference")
    assert explained.chosen == "torch/reference"
    assert len(list(explained)) == 1


def test_a_forced_kernel_that_refuses_is_a_verdict_and_no_error():
    with register(toy()):
        explained = explain(X, X, X, Causal(), kernel="toy/a")
    assert explained.chosen is None
    assert explained["toy/a"].refused_fields == ("bias",)
    with pytest.raises(NoKernelError, match="bias: takes no bias, got Causal"):
        explained.raise_if_refused()
    explain(X, X, X).raise_if_refused()


def test_a_forced_kernel_that_nobody_registered_is_an_error():
    with pytest.raises(UnknownKernelError, match="Did you mean 'torch/math'"):
        explain(X, X, X, kernel="torch/maths")


def test_where_nothing_takes_the_problem_nothing_is_chosen(monkeypatch):
    alone = Registry(list)
    alone.register(toy())
    for module in ("explain", "dispatch"):
        monkeypatch.setattr(sys.modules[f"attn_core.{module}"], "registry", alone)
    y = X.double()
    explained = explain(y, y, y)
    assert explained.chosen is None
    assert explained["toy/a"].state == "refused"
    with pytest.raises(NoKernelError, match="dtype: takes float32, got float64"):
        explained.raise_if_refused()
    with pytest.raises(NoKernelError, match=r"no kernel takes this problem: .*\n.*'toy/a' refuses") as error:
        attention(y, y, y, scale=0.123)  # as no call before: choices are kept
    assert "dtype: takes float32, got float64" in str(error.value)


# Arguments


def test_heads_first_operands_are_explained_as_the_drop_in_takes_them():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    explained = explain(query, key, key, layout="heads-first", enable_gqa=True)
    assert (explained.problem.num_heads, explained.problem.num_kv_heads) == (4, 2)
    assert (explained.problem.seqlen_q, explained.problem.seqlen_kv) == (5, 6)
    with record() as calls:
        scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert calls.kernels == {explained.chosen: 1}
    flat = torch.randn(5, 8)
    assert explain(flat, flat, flat, layout="heads-first").problem.num_heads == 1


def test_heads_that_do_not_agree_are_an_error_as_in_the_drop_in():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises(InputError, match="enable_gqa=True"):
        explain(query, key, key, layout="heads-first")


def test_another_layout_is_an_error():
    with pytest.raises(InputError, match='layout: must be "heads-last" or "heads-first", got \'bshd\''):
        explain(X, X, X, layout="bshd")


def test_arguments_that_do_not_fit_together_are_the_errors_of_the_call():
    with pytest.raises(InputError, match="key: batch must be query's 1, got 2"):
        explain(X, X.expand(2, -1, -1, -1), X)
    with pytest.raises(InputTypeError, match="query: takes a tensor, got int"):
        explain(1, X, X)


def test_a_problem_without_tensors_can_be_explained():
    explained = explain_problem(problem(head_dim=64, head_dim_v=64, bias=Causal().bind(4, 4).normalize()))
    assert explained.chosen == "torch/flash"
    assert explain_problem(problem(), kernel="torch/math").chosen == "torch/math"


# Devices that are not here


def test_an_unknown_compute_capability_is_noted_and_kernels_with_limits_are_refused():
    with FakeTensorMode():
        x = torch.empty(1, 64, 4, 64, device="cuda", dtype=torch.float16)
        explained = explain(x, x, x)
        out = attention(x, x, x)
    if explained.problem.compute_capability is not None:
        pytest.skip("this machine has a CUDA device to ask")
    assert explained.chosen is not None
    assert out.shape == x.shape
    assert out.device.type == "cuda"
    note = "note: compute capability unknown here; chosen among kernels without a limit"
    assert note in explained.notes
    assert note in str(explained)
    limited = [v for v in explained if "compute_capability" in v.refused_fields]
    assert limited
    assert all("unknown" in " ".join(v.reasons) for v in limited)


@pytest.mark.parametrize(
    ("compute_capability", "reason"),
    [((7, 0), "takes sm_80 or newer, got sm_70"), ((12, 1), "sm_121 is newer than known"), ((9, 0), None)],
    ids=["too old", "newer than known", "known"],
)
def test_a_known_compute_capability_is_compared_with_the_limits(compute_capability, reason):
    limited = Capabilities(
        devices={"cuda"},
        dtypes={torch.float32},
        head_dims={8},
        min_compute_capability=(8, 0),
        max_compute_capability=(9, 0),
    )
    with register(toy(capabilities=limited)):
        explained = explain_problem(problem(device="cuda", compute_capability=compute_capability))
    verdict = explained["toy/a"]
    assert (verdict.state == "refused") == (reason is not None)
    assert reason is None or reason in verdict.reasons[0]
    assert not any("unknown" in note for note in explained.notes)


# Printing and saving


def test_an_explanation_is_plain_data_for_json():
    with register(toy()), prefer("torch/math"):
        explained = explain(X, X, X, Window(2, 0))
        plain = json.loads(json.dumps(explained.to_dict()))
    assert set(plain) == {"problem", "chosen", "prefer", "strict", "notes", "verdicts"}
    assert plain["chosen"] == explained.chosen == "torch/math"
    assert plain["prefer"] == ["torch/math"]
    verdict = next(v for v in plain["verdicts"] if v["kernel"] == "torch/math")
    assert verdict["adaptations"] == ["materialize"]
    assert verdict["seconds"] == explained["torch/math"].seconds
    refused = next(v for v in plain["verdicts"] if v["kernel"] == "toy/a")
    assert (refused["state"], refused["refused_fields"]) == ("refused", ["bias"])


def test_an_explanation_prints_a_line_per_kernel():
    with register(toy()):
        text = str(explain(X, X, X, Window(2, 0)))
    lines = text.splitlines()
    window = 'Window(2, 0, "top-left").bind(4, 4)'
    assert lines[0] == f"problem: batch 1, seqlen 4, heads 2, head_dim 8, float32, cpu, {window}"
    line = next(line for line in lines if line.startswith("toy/a"))
    assert line.split()[1] == "refused"
    assert line.endswith(f"bias: takes no bias, got {window}")
    assert any("after materialize" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3e-6, "3 µs"), (2e-9, "0.002 µs")], ids=str
)
def test_estimates_are_printed_in_fitting_units(seconds, text):
    with register(toy(seconds=seconds)):
        line = next(line for line in str(explain(X, X, X)).splitlines() if line.startswith("toy/a"))
    assert line.endswith(text)


def test_an_estimate_that_was_not_measured_is_marked():
    with register(toy(costs={"cpu": Cost(call=2.0)})):
        explained = explain(X, X, X)
    line = next(line for line in str(explained).splitlines() if line.startswith("toy/a"))
    assert line.endswith("~2 s")
    assert any(note.startswith("note: ~ marks an estimate") for note in explained.notes)


def test_rich_prints_a_table_with_a_line_per_reason():
    from rich.console import Console

    with register(toy()):
        explained = explain(X, X, X, Causal(), softcap=2.0)
    out = io.StringIO()
    Console(file=out, width=200).print(explained)
    text = out.getvalue()
    for verdict in explained:
        assert verdict.kernel in text
        assert all(reason in text for reason in verdict.reasons)
    assert "chosen" in text


def test_an_explanation_within_allow_knows_it():
    rough = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, numerics="approximate")
    with register(toy(capabilities=rough)):
        assert explain(X, X, X).chosen != "toy/a"
        with allow("approximate"):
            assert explain(X, X, X).chosen == "toy/a"
