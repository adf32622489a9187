"""`attn report` of timm's models. timm is not among the test requirements: `nox -s timm` installs it."""

import json
import sys
from pathlib import Path

import pytest
from attn_core.cli import main
from attn_core.integrations import timm as attn_timm
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import timm_checks

timm_checks.define_torchvision_ops()
pytest.importorskip("timm", reason="timm is not installed; nox -s timm has it", exc_type=ImportError)


def invoked(*arguments):
    return CliRunner().invoke(main, ["report", *arguments])


def reported(*arguments):
    ended = invoked(*arguments, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def test_a_vit_s_attention_is_told_by_block():
    found = reported("vit_tiny_patch16_224", "--size", "32", "--set", "depth=3")
    [call] = found["calls"]
    assert call["modules"] == [f"blocks.{i}.attn" for i in range(3)]
    assert call["kernel"] == "torch/flash"
    assert call["problem"] == "batch 1, seqlen 5, heads 3, head_dim 64, float32, cpu"
    assert (found["library"], found["inputs"]) == ("timm", {"x": [1, 3, 32, 32]})
    assert [row["module"] for row in found["redirected"]] == call["modules"]
    assert found["not_redirected"] == []
    assert not attn_timm.is_enabled()


def test_modules_that_are_not_redirected_are_told_with_their_reason():
    found = reported("xcit_nano_12_p8_224", "--size", "64", "--set", "depth=1")
    assert {row["module"].partition(".")[0] for row in found["redirected"]} <= {"blocks", "cls_attn_blocks"}
    assert len(found["redirected"]) + len(found["not_redirected"]) == 3
    assert all(row["reason"] for row in found["not_redirected"])


def test_a_model_without_attention_says_so():
    ended = invoked("resnet18", "--size", "32")
    assert ended.exit_code == 0
    assert "no attention went through attn" in ended.stdout


def test_an_unknown_name_suggests_near_ones():
    ended = invoked("vit_tiny_patch16_24")
    assert ended.exit_code == 2
    assert "no model 'vit_tiny_patch16_24'. Did you mean 'vit_tiny_patch16_224'" in ended.stderr
