"""Problems recorded from real models: enough of them, from each library, and a kernel can be chosen for every one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import attn_core
import pytest
import torch
from attn_core import ALiBi, Causal, KeyPadding, Problem, TensorBias, Window
from attn_core.conformance import CHECKS, check_kernel
from attn_core.conformance.subject import Subject
from attn_core.registry import registry
from attn_core.scope import Settings
from attn_core.select import choose
from attn_core.testing.problems import build
from attn_core.testing.recorded import described, evenly, recorded_problems

#: Logits of a problem that is built here.
SMALL = 1 << 16


@pytest.fixture(scope="module")
def recorded():
    return recorded_problems()


def test_there_are_hundreds_from_each_of_three_libraries_and_none_twice(recorded):
    libraries = Counter(each.library for each in recorded)
    assert len(recorded) >= 200
    assert set(libraries) == {"timm", "transformers", "diffusers"}
    assert min(libraries.values()) >= 50
    assert len({each.problem for each in recorded}) == len(recorded)


def test_each_says_where_it_came_from(recorded):
    for each in recorded:
        assert all((each.library, each.version, each.model, each.module, each.mode)), each
        assert "?" not in each.module, each.origin
        assert each.origin == f"{each.library} {each.version}, {each.model}, {each.module}, {each.mode}"
        assert each.model not in each.also
        assert each.form in ("passed", "meant")


def test_what_a_model_meant_stands_beside_what_it_passed(recorded):
    meant = [each for each in recorded if each.form == "meant"]
    assert {type(each.problem.bias).__name__ for each in meant} >= {"Causal", "Window", "KeyPadding", "Intersection"}


def test_they_have_what_one_would_not_think_of(recorded):
    problems = [each.problem for each in recorded]
    assert any(problem.seqlen_q == 197 for problem in problems)
    assert any(problem.seqlen_q == 1 < problem.seqlen_kv for problem in problems)
    assert any(problem.head_dim == 196 for problem in problems)
    assert any(problem.batch >= 128 for problem in problems)
    assert any(problem.seqlen_q % 2 == 1 and problem.seqlen_kv % 8 == 5 for problem in problems)
    assert any(problem.bias_requires_grad for problem in problems)
    assert any(problem.softcap is not None for problem in problems)
    assert any(problem.num_heads > problem.num_kv_heads > 1 for problem in problems)
    assert {problem.dtype for problem in problems} == {torch.float32, torch.bfloat16, torch.float16}


def test_a_kernel_is_chosen_for_every_one(recorded):
    for each in recorded:
        chosen = choose(registry, each.problem, Settings())
        assert chosen.takes, each.origin
        assert chosen.seconds > 0, each.origin


def test_operands_can_be_built_for_each_small_one_and_ask_it_again(recorded):
    small = [
        each
        for each in recorded
        if each.problem.batch * each.problem.num_heads * each.problem.seqlen_q * each.problem.seqlen_kv <= SMALL
    ]
    assert len(small) >= 10
    for each in evenly(small, 20):
        inputs = build(each.problem, seed=0)
        options = {"dropout_p": 0.0} | inputs.options
        asked = attn_core.explain(inputs.query, inputs.key, inputs.value, inputs.bias, **options).problem
        assert replace(asked, deterministic=False) == each.problem, each.origin


def test_a_problem_can_be_written_down_as_it_is_in_the_file():
    text = files("attn_core.testing").joinpath("recorded.json").read_text(encoding="utf-8")
    rows = json.loads(text)["problems"]
    for row, each in zip(rows, recorded_problems(), strict=True):
        assert {key: row[key] for key in described(each.problem)} == described(each.problem), each.origin


def test_a_bias_that_is_not_recorded_is_an_error_with_its_kind():
    plain = Problem(
        batch=1, seqlen_q=4, seqlen_kv=4, num_heads=2, num_kv_heads=2, head_dim=8, head_dim_v=8,
        dtype=torch.float32, device="cpu", bias=ALiBi(2, corner="top-left").bind(4, 4).without_data(),
    )  # fmt: skip
    with pytest.raises(TypeError, match="no rule for a ALiBi"):
        described(plain)


@pytest.mark.parametrize(
    "bias",
    [
        Causal("top-left"),
        Window(3, None, "bottom-right"),
        KeyPadding([1, 4]) & Causal("bottom-right"),
        TensorBias(torch.zeros(2, 1, 4, 4, requires_grad=True)),
    ],
    ids=lambda bias: type(bias).__name__,
)
def test_what_is_described_names_the_bias(bias):
    problem = Problem(
        batch=2, seqlen_q=4, seqlen_kv=4, num_heads=2, num_kv_heads=2, head_dim=8, head_dim_v=8,
        dtype=torch.float32, device="cpu", bias=bias.bind(4, 4).without_data(),
    )  # fmt: skip
    data = json.loads(json.dumps(described(problem)))
    assert data["bias"]["kind"] == type(bias).__name__


def test_evenly_takes_from_every_library_every_kind_and_the_whole_length(recorded):
    few = evenly(recorded, 60)
    assert len(few) == len({id(each) for each in few}) == 60
    assert Counter(each.library for each in few) == {"timm": 20, "transformers": 20, "diffusers": 20}
    assert {each.kind for each in few} == {each.kind for each in recorded}
    plain = [recorded.index(each) for each in few if each.library == "timm" and each.kind == "no bias"]
    assert plain[-1] - plain[0] > 100
    assert len(evenly(recorded, 10_000)) == len(recorded)
    assert evenly([], 5) == []


def test_the_kit_replays_thirty_of_them_with_their_origin():
    check = CHECKS["agrees_on_recorded_problems"]
    cases = list(check.cases(Subject(attn_core.kernels("torch/math")[0], "cpu")))
    assert len(cases) == 30
    assert {case.label.split()[0] for case in cases} == {"timm", "transformers", "diffusers"}


def test_a_kernel_that_is_wrong_on_models_shapes_only_is_caught_by_them():
    def wrong_for_197(query, key, value, *, scale):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)
        return out * 1.5 if query.shape[1] == 197 else out

    claims = attn_core.Capabilities(
        devices={"cpu"}, dtypes={torch.float32, torch.bfloat16}, head_dims=range(1, 257), empty_lengths=True
    )
    kernel = attn_core.Kernel(name="wrong/197", run=wrong_for_197, capabilities=claims)
    results = check_kernel(kernel, only="agrees_on_recorded_problems", stop_at_failure=True)
    failed = [result for result in results if not result]
    assert failed
    assert all("x197x197x" in result.case for result in failed)
