"""Releases whose functions return other things, what `attn doctor` says to type, and where no kernel belongs."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from attn_core import explain
from attn_core.cli import main
from attn_flash import library
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_doubled import BY_NAME, LIBRARIES, doubled, installed_from, registered
from problems import ALL, FORWARD, HALF_CLOSE


def older(function, always_a_tuple):
    """As `function` was in a beta: without `return_attn_probs`, returning both, or the output alone."""
    signed = inspect.signature(function)
    signed = signed.replace(parameters=[p for p in signed.parameters.values() if p.name != "return_attn_probs"])

    def beta(*args, **options):
        given = signed.bind(*args, **options).arguments
        out, lse = function(**given, return_attn_probs=True)
        return (out, lse) if always_a_tuple else out

    beta.__signature__ = signed
    return beta


@pytest.mark.parametrize("always_a_tuple", [False, True], ids=["the output alone", "always a tuple"])
def test_betas_of_flash_attention_3_return_what_they_return(tmp_path, monkeypatch, always_a_tuple):
    with doubled(tmp_path, "fa3"):
        module = library.FA3.module()
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            monkeypatch.setattr(module, name, older(getattr(module, name), always_a_tuple))
        with registered("fa3"):
            for label in ("causal", "documents, causal"):
                operands = ALL[label].operands()
                out = ALL[label].by("flash/fa3", operands)
                torch.testing.assert_close(out.double(), ALL[label].right(operands)[0], **HALF_CLOSE)
            plain = [operand.detach() for operand in operands]
            verdict = next(v for v in explain(*plain, return_lse=True).verdicts if v.kernel == "flash/fa3")
            assert verdict.refused_fields == ("return_lse",)
            assert "have no return_attn_probs" in verdict.reasons[0]
            cached = FORWARD["cache"]
            plain = [operand.detach() for operand in cached.operands()]
            _, lse = cached.by("flash/fa3", plain, return_lse=True)  # there it was always told
            torch.testing.assert_close(lse.double(), cached.right(plain)[1], **HALF_CLOSE)


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_no_kernel_takes_what_lies_on_the_cpu(tmp_path, name):
    with doubled(tmp_path, name), registered():
        query = torch.randn(1, 4, 2, 16, dtype=torch.float16)
        verdict = next(v for v in explain(query, query, query).verdicts if v.kernel == f"flash/{name}")
        assert verdict.refused_fields == ("device",)


def findings():
    """What `attn doctor` finds of these kernels, by name."""
    said = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(said.output)["findings"]
    return {each["name"]: each for each in found if each["what"] == "kernel" and each["name"].startswith("flash/")}


def test_doctor_prints_the_line_to_type_for_each_library_that_is_absent(tmp_path):
    with installed_from(tmp_path), registered():
        found = findings()
    assert set(found) == {f"flash/{name}" for name in BY_NAME}
    for name, each in LIBRARIES.items():
        assert found[f"flash/{name}"]["state"] == "absent"
        assert found[f"flash/{name}"]["fix"] == each.install
    assert "'attn-flash[fa2]'" in found["flash/fa2"]["fix"]
    assert "'attn-flash[fa4]'" in found["flash/fa4"]["fix"]


def test_doctor_finds_nothing_amiss_of_libraries_that_are_whole(tmp_path):
    with doubled(tmp_path, *BY_NAME), registered():
        assert not findings()


def test_the_extras_name_the_versions_that_are_spoken_to():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for extra, each in (("fa2", library.FA2), ("fa4", library.FA4)):
        assert f'{extra} = ["{each.distribution}{each.supported}"]' in text
        assert f"attn-flash[{extra}]" in each.install
        assert f"'{each.distribution}{each.supported}'" in each.rebuild
