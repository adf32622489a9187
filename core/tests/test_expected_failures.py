"""Checks that a kernel's author knows to fail, in check_kernel and as tests of pytest."""

from __future__ import annotations

import re

import attn_core
import pytest
import torch
from attn_core import Capabilities, InputError, Kernel
from attn_core.conformance import CheckResult, check_kernel
from attn_core.conformance.certificate import certificate
from attn_core.conformance.parametrize import parametrize_kernel_checks

CHECK = "returns_what_was_asked_for"


def run(query, key, value, *, scale):
    """Right, but that it answers float32 whatever it is given."""
    query, key, value = query.float(), key.float(), value.float()
    weights = (scale * torch.einsum("bqhd,bkhd->bhqk", query, key)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


CLAIMS = Capabilities(devices={"cpu"}, dtypes={torch.float32, torch.bfloat16}, head_dims={64})
WRONG = Kernel(name="wrong/attend", run=run, capabilities=CLAIMS)


def test_one_of_pytests_must_fail_and_must_be_there():
    marks = parametrize_kernel_checks(["torch/math"], expected_failures={"repeats_itself": "is known"})
    rows = {parameter.id: parameter for parameter in marks.args[1]}
    expected = [id for id, parameter in rows.items() if parameter.marks]
    assert expected
    assert all("repeats_itself" in id for id in expected)
    assert all(mark.kwargs == {"reason": "is known", "strict": True} for id in expected for mark in rows[id].marks)
    with pytest.raises(InputError, match="no check is named repeats_her"):
        parametrize_kernel_checks(["torch/math"], expected_failures={"repeats_her": "?"})


def test_a_kernel_is_checked_without_pytest_with_what_is_known_to_fail():
    known = f"{CHECK}[dtype bfloat16]"
    plain = {result.name: result for result in check_kernel(WRONG, only=CHECK)}
    assert plain[known].status == "failed"
    reasons = {known: "it computes in float32"}
    results = {result.name: result for result in check_kernel(WRONG, only=CHECK, expected_failures=reasons)}
    assert (results[known].status, bool(results[known])) == ("xfailed", True)
    assert results[known].reason == f"it computes in float32 ({plain[known].reason})"
    others = [name for name in results if name != known]
    assert [results[name].status for name in others] == [plain[name].status for name in others]


def test_what_is_expected_to_fail_must_fail():
    results = check_kernel("torch/math", only="repeats_itself", expected_failures={"repeats_itself": "is known"})
    assert {result.status for result in results} == {"failed"}
    assert results[0].reason == "it holds, and is in expected_failures: is known"
    skipped = check_kernel(
        "torch/math", only="runs_in_the_current_stream", expected_failures={"runs_in_the_current_stream": "?"}
    )
    assert {result.status for result in skipped} == {"skipped"}, "nothing was shown"


def test_what_is_expected_to_fail_must_be_there():
    for unknown in ("repeats_her", "agrees[dtype int8]"):
        with pytest.raises(InputError, match=re.escape(f"expected_failures: no check is named {unknown}")):
            check_kernel("torch/math", only="repeats_itself", expected_failures={unknown: "?"})
    other = {"agrees[dtype float32]": "fits, and is not run here"}
    assert all(check_kernel("torch/math", only="repeats_itself", expected_failures=other))


def test_no_certificate_is_granted_on_what_is_known_to_fail():
    row = CheckResult(
        kernel="good/attend", check="agrees", case="gqa", status="xfailed", proves="gqa", reason="is known"
    )
    made = certificate(attn_core.kernels("torch/math")[0], "cpu", [row])
    assert not made.granted
    assert (made.claims["gqa"], made.checks["agrees"]["failed"]) == ("failed", 1)
    assert made.failures[0]["reason"] == "is known"
