"""`attn report`: what would run a model of transformers, where and why; what is wrong is said in one line."""

import json
import sys

import pytest
from attn_core.cli import report_models
from attn_core.cli.group import main
from attn_core.integrations import missing
from click.testing import CliRunner

pytest.importorskip("transformers")
from attn_core.integrations import transformers as attn_transformers

SMALL = [
    *("--set", "num_hidden_layers=3"),
    *("--set", "hidden_size=32"),
    *("--set", "num_attention_heads=4"),
    *("--set", "intermediate_size=32"),
    *("--set", "vocab_size=50"),
]


def invoked(*arguments):
    return CliRunner().invoke(main, ["report", *arguments])


def reported(*arguments):
    ended = invoked(*arguments, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def failed(*arguments):
    """What it says on standard error, and nothing on the other."""
    ended = invoked(*arguments)
    assert ended.exit_code == 2, ended.output
    assert not ended.stdout
    return ended.stderr


def test_a_model_s_attention_is_told_by_module_with_its_kernel_and_the_next_best():
    found = reported("bert", *SMALL, "--seqlen", "16", "--batch", "2")
    [call] = found["calls"]
    assert call["modules"] == [f"encoder.layer.{i}.attention.self" for i in range(3)]
    assert call["kernel"] == "torch/flash"
    assert call["calls"] == 3
    assert call["problem"] == "batch 2, seqlen 16, heads 4, head_dim 8, float32, cpu"
    assert call["next_best"]["kernel"] != "torch/flash"
    assert call["next_best"]["times"] >= 1.0
    [problem] = found["problems"]
    assert problem["chosen"] == "torch/flash"
    assert found["library"] == "transformers"
    assert found["inputs"] == {"input_ids": [2, 16], "attention_mask": [2, 16]}
    assert {row["module"] for row in found["redirected"]} == set(call["modules"])
    assert found["not_redirected"] == []


def test_it_prints_tables_and_leaves_transformers_as_it_was():
    ended = invoked("bert", *SMALL, "--seqlen", "16")
    assert ended.exit_code == 0
    for expected in (
        "bert (transformers), ",
        "random weights; input_ids [1, 16], attention_mask [1, 16], float32, cpu",
        "encoder.layer.0.attention.self",
        "encoder.layer.2.attention.self",
        "torch/flash",
        "times the seconds, as estimated",
        "why not the others",
    ):
        assert expected in ended.stdout
    assert not attn_transformers.is_enabled()


def test_modules_are_in_the_order_of_a_reader():
    found = reported("bert", "--set", "num_hidden_layers=12", *SMALL[2:])
    [call] = found["calls"]
    assert call["modules"] == [f"encoder.layer.{i}.attention.self" for i in range(12)]


def test_options_of_the_call_reach_the_problem():
    found = reported("llama", *SMALL, "--set", "num_key_value_heads=2", "--dtype", "bfloat16", "--grad")
    [call] = found["calls"]
    assert "heads 4:2" in call["problem"]
    assert "bfloat16" in call["problem"]
    assert 'Causal("top-left")' in call["problem"]
    assert "requires_grad" in call["problem"]
    assert found["inputs"]["input_ids"] == [1, 128]


def test_a_preferred_kernel_comes_first_and_the_others_are_told():
    found = reported("bert", *SMALL, "--prefer", "torch/math")
    [call] = found["calls"]
    assert call["kernel"] == "torch/math"
    assert found["problems"][0]["prefer"] == ["torch/math"]


def test_images_and_models_of_two_inputs_are_run():
    size = ["--set", "image_size=32", "--set", "patch_size=16"]
    found = reported("vit", *SMALL[:8], *size)
    assert found["inputs"] == {"pixel_values": [1, 3, 32, 32]}
    assert "seqlen 5" in found["calls"][0]["problem"]
    found = reported("t5", "--set", "num_layers=1", "--set", "d_model=16", "--set", "d_kv=8", "--set", "num_heads=2")
    assert "decoder_input_ids" in found["inputs"]
    assert sum(call["calls"] for call in found["calls"]) == 3


def test_what_is_not_redirected_is_told_with_its_reason():
    flags = [*SMALL, *("--set", "num_key_value_heads=2"), *("--set", "num_local_experts=4"), *("--set", "head_dim=8")]
    found = reported("gpt_oss", *flags)
    assert found["calls"] == []
    assert len(found["not_redirected"]) == 3
    assert "sinks" in found["not_redirected"][0]["reason"]
    ended = invoked("gpt_oss", *flags)
    assert "no attention went through attn" in ended.stdout
    assert "not redirected" in ended.stdout
    assert "sinks" in ended.stdout


def test_an_unknown_name_suggests_near_ones():
    assert "no model 'brt'. Did you mean 'bert'" in failed("brt")
    assert "transformers has no model 'brt'. Did you mean 'bert'" in failed("transformers:brt")
    assert "Weights are not fetched: say the kind of model, such as 'bert'" in failed("google/bert")


def test_a_library_may_be_named():
    assert reported("transformers:bert", *SMALL)["model"] == "bert"


def test_a_library_that_is_missing_or_broken_is_named_with_the_line_to_type(monkeypatch):
    def broken():
        raise OSError("a stale library")

    monkeypatch.setitem(report_models.NAMES, "timm", broken)
    told = failed("vit_base_patch16_224")
    assert "a model of timm needs timm, which cannot be imported (OSError: a stale library)." in told
    assert 'To install it: pip install "timm' in told
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs timm: timm is not installed" in failed("timm:vit_base_patch16_224")

    def absent(module, purpose, fix):
        raise missing.MissingPackageError(f"{purpose} needs {module}: {module} is not installed.\nTo install it: {fix}")

    monkeypatch.setattr(report_models, "need", absent)
    told = failed("bert")
    assert 'pip install "timm' in told
    assert 'pip install "transformers' in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bert", *SMALL, "--set", "hidden_size=7"], "transformers cannot make 'bert' with"),
        (["bert", "--set", "hidden"], "must be NAME=VALUE, such as num_hidden_layers=2, got 'hidden'"),
        (["bert", "--device", "gpu"], "'gpu' cannot be used here"),
        (["bert", *SMALL, "--seqlen", "600"], "BertModel fails on input_ids [1, 600]"),
        (["bert", *SMALL, "--batch", "0"], "0 is not in the range"),
        (["bert", *SMALL, "--prefer", "torch/mth"], "Did you mean 'torch/math'"),
    ],
    ids=["setting", "no value", "device", "length", "batch", "kernel"],
)
def test_what_is_wrong_is_said(arguments, told):
    assert told in failed(*arguments)
    assert not attn_transformers.is_enabled()


def test_a_model_that_the_memory_does_not_hold_is_not_made(monkeypatch):
    monkeypatch.setattr(report_models, "free_memory", lambda: 2**20)
    told = failed("bert")
    assert "bert: 0.1 billion parameters take 0.4 GiB, and 0.0 GiB are free." in told
    assert "--set num_hidden_layers=2" in told
    monkeypatch.setattr(report_models, "free_memory", lambda: None)  # a machine that does not say
    reported("bert", *SMALL)
