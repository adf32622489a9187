"""bench_model on models of timm: eager and stock are timm's own, kernels are insisted on, and timm stays as it came."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attn_core.bench_model import BuiltModel, bench_model
from attn_core.bench_model.results import ATTN, EAGER, FORWARD, STOCK, TRAIN
from attn_core.integrations import timm as attn_timm

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import timm_checks
from timm_models import Arch, small

timm_checks.define_torchvision_ops()
pytest.importorskip("timm", reason="timm is not installed; nox -s timm has it", exc_type=ImportError)

TOLERANCE = 1e-5


def measured_of(arch, *kernels):
    inputs = {"x": arch.images()}
    built = BuiltModel(name=arch.name, host="timm", model=arch.build(), inputs=inputs)
    found = bench_model(built, kernels=kernels, rounds=1, memory=False)
    assert not attn_timm.is_enabled()
    return found, built.model


def test_a_kernel_without_a_gradient_for_the_bias_runs_the_forward_and_refuses_the_training_step():
    found, model = measured_of(Arch("beit_base_patch16_224", "", **small(32, depth=1)), "torch/flash", "torch/math")
    for row in found.rows:
        assert row.outputs is None or row.outputs.value < TOLERANCE
        assert row.gradients is None or row.gradients.value < TOLERANCE * row.gradients.largest
    assert found.row("torch/flash", FORWARD).calls == {"torch/flash": 1}
    assert found.row("torch/flash", TRAIN).state == "refused"
    assert "bias_grad" in found.row("torch/flash", TRAIN).reason
    assert found.row("torch/math", TRAIN).calls == {"torch/math": 1}
    assert found.row(ATTN, TRAIN).state == "ran"
    assert found.row(STOCK, TRAIN).calls == found.row(EAGER, TRAIN).calls == {}
    assert all(block.attn.fused_attn for block in model.blocks)


def test_modules_that_timm_leaves_out_are_measured_by_attn_and_are_eager_in_stock():
    arch = Arch("swin_tiny_patch4_window7_224", "", **small(56, depths=(1, 1), embed_dim=32, num_heads=(2, 4)))
    found, model = measured_of(arch, "torch/math")
    assert found.row(STOCK).outputs.value == 0.0
    assert found.row("torch/math").calls == {"torch/math": 2}
    assert found.row("torch/math", TRAIN).gradients.value < TOLERANCE * found.row(STOCK, TRAIN).gradients.largest
    assert not any(getattr(module, "fused_attn", False) for module in model.modules())
    assert found.left_alone == []


def test_a_model_whose_attention_is_its_own_has_no_row_of_a_kernel_that_ran():
    arch = Arch("swinv2_tiny_window8_256", "", **small(64, depths=(1, 1), num_heads=(3, 6)))
    found, _ = measured_of(arch, "torch/math")
    assert found.row("torch/math").state == found.row(ATTN).state == "refused"
    assert "no attention of this model goes through attn" in found.row("torch/math").reason
    assert "cosine attention" in found.left_alone[0]
    assert found.row(STOCK).of_stock == 1.0
