"""attn-natten beside the core: whatever NATTEN is installed, there is an answer, and it is said why NATTEN gave none.

NATTEN is a double in plain torch, so what is tested is how the core chooses and what its commands say, not NATTEN.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import KernelRefusedError, Neighborhood, attention, environment, prefer, record
from attn_core.cli import main
from attn_core.testing import fake_distribution
from click.testing import CliRunner

pytest.importorskip("attn_natten", reason="attn-natten is not installed; nox -s combo(attn-natten) has it")

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "attn-natten" / "tests"))
from natten_doubled import doubled

CUDA = [f"natten/{family}-{kind}" for family in ("blackwell", "cutlass", "hopper") for kind in ("fmha", "fna")]
FLEX = ["natten/flex-fmha", "natten/flex-fna"]
WITHOUT_LIBNATTEN = {"changes": {"HAS_LIBNATTEN = True": "HAS_LIBNATTEN = False"}}
NEAR = Neighborhood((4, 5), kernel_size=3)
THIN = Neighborhood((4, 5), kernel_size=(1, 3))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in environment.Environment.__dataclass_fields__:
        monkeypatch.delenv(f"ATTN_{name.upper()}", raising=False)
    monkeypatch.setenv("ATTN_COSTS", "")
    yield
    attn_core.refresh()


@contextmanager
def with_natten(folder, **written):
    """Within it, this plugin is installed beside such a NATTEN."""
    if not is_installed("attn-natten"):
        fake_distribution(folder, "attn-natten", "0.1.0", {}, {"natten": "attn_natten.plugin"})
    with doubled(folder, **written):
        attn_core.refresh()
        yield


def is_installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def command(*arguments, exit_code=0):
    """What a command says, as data."""
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == exit_code, done.output
    return json.loads(done.output)


def found_amiss():
    """name -> (state, reason, what to type), of the kernels of NATTEN, by `attn doctor`."""
    code = {"broken": 1}
    said = CliRunner().invoke(main, ["doctor", "--json"])
    findings = json.loads(said.output)["findings"]
    mine = {each["name"]: each for each in findings if each["name"].startswith("natten/")}
    states = {each["state"] for each in mine.values()}
    assert said.exit_code == max([code.get(state, 0) for state in states], default=0)
    return {name: (each["state"], each["reason"], each["fix"]) for name, each in mine.items()}


def explained(bias, *flags):
    """(the kernel that would run it, name -> why each of NATTEN's would not), by `attn explain`."""
    said = command("explain", "--bias", bias, "--head-dim", "32", *flags)
    verdicts = {each["kernel"]: each for each in said["verdicts"]}
    return said["chosen"], {name: each for name, each in verdicts.items() if name.startswith("natten/")}


def operands():
    torch.manual_seed(20261121)
    return [torch.randn(1, 20, 2, 32) for _ in range(3)]


STATES = {
    "another version": ({"version": "0.17.5", "source": "raise RuntimeError('imported')"}, "unavailable", "0.17.5"),
    "it raises": ({"source": "raise OSError('libcudart.so.13: cannot open')"}, "broken", "libcudart.so.13"),
}


@pytest.mark.parametrize("state", STATES)
def test_where_no_kernel_of_natten_can_run_another_does_and_the_reason_is_told(tmp_path, state):
    written, expected, reason = STATES[state]
    with with_natten(tmp_path, **written):
        amiss = found_amiss()
        assert sorted(amiss) == sorted([*CUDA, *FLEX])
        assert all(told[0] == expected and reason in told[1] for told in amiss.values())
        chosen, verdicts = explained("Neighborhood((4, 5), kernel_size=3)")
        assert chosen.startswith("torch/")
        assert {each["state"] for each in verdicts.values()} == {expected}
        with record() as calls:
            attention(*operands(), NEAR)
        assert all(name.startswith("torch/") for name in calls.kernels)
        with pytest.raises(KernelRefusedError, match=reason):
            attention(*operands(), NEAR, kernel="natten/cutlass-fna")


def test_without_libnatten_doctor_says_what_to_type_for_the_cuda_kernels_alone(tmp_path):
    with with_natten(tmp_path, **WITHOUT_LIBNATTEN):
        amiss = found_amiss()
        assert sorted(amiss) == sorted(CUDA)
        state, reason, fix = next(iter(amiss.values()))
        assert (state, "without libnatten" in reason, "pip install" in fix) == ("unavailable", True, True)
        _, verdicts = explained("Neighborhood((4, 5), kernel_size=3)")
        assert all("without libnatten" in json.dumps(verdicts[name]) for name in CUDA)
        assert all("without libnatten" not in json.dumps(verdicts[name]) for name in FLEX)


def test_what_natten_refuses_another_kernel_runs_though_natten_is_preferred(tmp_path):
    with with_natten(tmp_path), prefer("natten/*"):
        for bias, kernel in ((NEAR, "natten/flex-fna"), (THIN, None)):
            with record() as calls:
                out = attention(*operands(), bias)
            [ran] = calls.kernels
            assert ran == kernel if kernel else ran.startswith("torch/")
            expected, _ = attn_core.reference_attention(*operands(), bias)
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_explain_says_which_field_natten_refuses_and_why(tmp_path):
    with with_natten(tmp_path):
        chosen, verdicts = explained("Neighborhood((4, 5), kernel_size=(1, 3))")
        assert chosen.startswith("torch/")
        assert "2 and more keys on every axis" in json.dumps(verdicts["natten/flex-fna"])
        assert "device" in json.dumps(verdicts["natten/cutlass-fna"])
        _, verdicts = explained("Neighborhood((4, 5), kernel_size=3)", "--grad")
        assert "backward" in json.dumps(verdicts["natten/flex-fna"])


def test_its_own_word_is_told_where_natten_refuses_by_itself(tmp_path):
    with with_natten(tmp_path):
        import natten

        natten.backends.REFUSES["can_run_flex_attention"] = lambda q, k, v, o: "not with 32 of anything"
        chosen, verdicts = explained("Neighborhood((4, 5), kernel_size=3)")
        assert chosen.startswith("torch/")
        assert "NATTEN says: not with 32 of anything" in json.dumps(verdicts["natten/flex-fna"])


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("8.0", "natten/cutlass-fna"), ("9.0", "natten/hopper-fna"), ("10.0", "natten/blackwell-fna")],
)
def test_for_neighborhoods_on_a_gpu_the_kernel_made_for_it_is_chosen(tmp_path, capability, kernel):
    flags = ("--device", "cuda", "--compute-capability", capability, "--dtype", "bfloat16", "--grad", "--batch", "16")
    with with_natten(tmp_path):
        said = command("explain", "--bias", "Neighborhood((64, 64), kernel_size=9)", *flags)
    assert said["chosen"] == kernel


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_installing_natten_moves_no_dense_call_away_from_torch(tmp_path, capability):
    flags = ("--device", "cuda", "--compute-capability", capability, "--dtype", "bfloat16", "--grad")
    with with_natten(tmp_path):
        for more in (("--seqlen", "64"), ("--seqlen", "16384"), ("--causal", "top-left")):
            assert command("explain", *flags, *more)["chosen"].startswith("torch/")


def test_causal_documents_on_a_gpu_go_to_natten_rather_than_to_tiles(tmp_path):
    flags = ("--device", "cuda", "--compute-capability", "9.0", "--dtype", "bfloat16", "--seqlen", "6000")
    with with_natten(tmp_path):
        said = command("explain", "--bias", "Segments([3000, 2000, 1000], within=Causal('top-left'))", *flags)
    assert said["chosen"] == "natten/hopper-fmha"


def test_causal_attention_may_be_asked_of_natten_by_name(tmp_path):
    flags = ("--device", "cuda", "--compute-capability", "9.0", "--dtype", "float16", "--causal", "top-left")
    with with_natten(tmp_path):
        said = command("explain", *flags, "--kernel", "natten/hopper-fmha")
    assert said["chosen"] == "natten/hopper-fmha"
