"""diffusers' families, compiled whole, and split over two processes: what takes too long for every run of the tests.

nox -s diffusers
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
from attn_core import record
from attn_core.integrations.diffusers import disable, enable, report

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from diffusers_models import BATCH, MODELS, SEED, run

TEXT = 5
PADDED = torch.arange(TEXT) < torch.tensor([[TEXT], [3]])
ATOL = 1e-5


@pytest.fixture(autouse=True)
def stock():
    """No test leaves it enabled, or graphs behind: of code that models share, torch keeps eight."""
    yield
    disable()
    torch.compiler.reset()


def cogvideox():
    return (
        diffusers.CogVideoXTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": TEXT,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 8),
            "timestep": torch.tensor([1, 2]),
        },
    )


def ltx():
    return (
        diffusers.LTXVideoTransformer3DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "num_layers": 1,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 2 * 4 * 4, 4),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
            "timestep": torch.tensor([1, 2]),
            "encoder_attention_mask": PADDED,
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    )


def pixart():
    return (
        diffusers.PixArtTransformer2DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8, 8),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
            "timestep": torch.tensor([1, 2]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": PADDED,
        },
    )


def lumina2():
    return (
        diffusers.Lumina2Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 8,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8, 8),
            "timestep": torch.tensor([0.1, 0.2]),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 8),
            "encoder_attention_mask": PADDED,
        },
    )


def auraflow():
    return (
        diffusers.AuraFlowTransformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8, 8),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
            "timestep": torch.tensor([0.1, 0.2]),
        },
    )


def qwen_image():
    return (
        diffusers.QwenImageTransformer2DModel,
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 16, 16),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
            "encoder_hidden_states_mask": PADDED,
            "timestep": torch.tensor([0.1, 0.2]),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
        },
    )


def hunyuan_video():
    return (
        diffusers.HunyuanVideoTransformer3DModel,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 8, 8),
            "timestep": torch.tensor([1, 2]),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
            "encoder_attention_mask": PADDED,
            "pooled_projections": torch.randn(BATCH, 8),
            "guidance": torch.tensor([1000.0, 2000.0]),
        },
    )


def mochi():
    return (
        diffusers.MochiTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": TEXT,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 8, 8),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 16),
            "timestep": torch.tensor([1, 2]),
            "encoder_attention_mask": PADDED,
        },
    )


MORE = {
    function.__name__.replace("_", "-"): function
    for function in (cogvideox, ltx, pixart, lumina2, auraflow, qwen_image, hunyuan_video, mochi)
}


def made(name):
    if name in MODELS:
        return MODELS[name]()
    torch.manual_seed(SEED)
    cls, config, inputs = MORE[name]()
    model = cls(**config)
    with torch.no_grad():  # some begin as zero, and hide what lies before them
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model, inputs()


def step(name):
    """Output and gradients of a training step of a model made anew."""
    model, inputs = made(name)
    out = model(**inputs).sample
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MORE)
def test_output_and_gradients_of_a_model_are_those_of_stock_and_all_of_it_goes_by_attn(name):
    expected, expected_gradients = step(name)
    assert expected.abs().max() > 1e-3
    enable()
    with record() as ran:
        got, gradients = step(name)
    assert sum(ran.kernels.values()) >= 1
    assert all(kernel.startswith("torch/") for kernel in ran.kernels)
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected_gradients[parameter],
            atol=float(1e-5 * largest),
            rtol=1e-4,
            msg=lambda m: f"{parameter}: {m}",  # noqa: B023
        )
    reported = report(made(name)[0])
    assert reported.redirected
    assert not reported.left_alone
    disable()
    again, _ = step(name)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_is_one_graph_and_goes_back_when_attn_is_disabled(name):
    model, inputs = MODELS[name]()
    model.eval()
    if name == "autoencoder":
        inputs["sample_posterior"] = False
    with torch.no_grad():
        expected = model(**inputs).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs).sample, expected)
        enable(prefer="torch/math")
        with record() as ran:
            got = compiled(**inputs).sample
        assert set(ran.kernels) == {"torch/math"}
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        disable()
        with record() as ran:
            assert torch.equal(compiled(**inputs).sample, expected)
        assert not ran.kernels


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-3", "wan"])
def test_a_compiled_model_trains_as_stock_does(name):
    expected, expected_gradients = run(name)
    enable()
    model, inputs = MODELS[name]()
    model.train()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).sample
    out.square().mean().backward()
    torch.testing.assert_close(out.detach(), expected, atol=ATOL, rtol=0)
    for parameter, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(
                value.grad,
                expected_gradients[parameter],
                atol=ATOL,
                rtol=1e-4,
                msg=lambda m: f"{parameter}: {m}",  # noqa: B023
            )


@pytest.mark.parametrize("how", ["ulysses_degree", "ring_degree"])
def test_a_model_split_over_two_processes_goes_by_diffusers_own_way_and_record_says_so(tmp_path, how):
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    ended = [process.communicate() for process in [_rank(rank, tmp_path, how) for rank in range(2)]]
    printed = [out for out, _ in ended]
    assert all("{" in out for out in printed), "\n".join(error[-3000:] for _, error in ended)
    for out in printed:
        saw = json.loads(out.splitlines()[-1])
        if "refused" in saw:  # native returns no log-sum-exp, which a ring needs: diffusers' own error, not one of attn
            assert how == "ring_degree"
            assert saw["refused"] == saw["stock refused"]
        else:
            assert saw["difference"] < ATOL
            assert list(saw["kernels"]) == ["torch (stock)"]
            assert "context parallelism" in saw["reason"]


def _rank(rank, folder, how):
    code = f"""
        import json, os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch.distributed as dist
        from attn_core import record
        from attn_core.integrations.diffusers import disable, enable
        from diffusers import ContextParallelConfig
        from diffusers_models import MODELS

        torch.accelerator.device_count = lambda: 1  # by which diffusers divides, where there is none
        dist.init_process_group("gloo", init_method="file://{folder}/rendezvous", rank={rank}, world_size=2)

        def inputs_and_model():
            model, inputs = MODELS["flux"]()
            inputs["encoder_hidden_states"] = torch.cat([inputs["encoder_hidden_states"]] * 2, 1)[:, :6]
            inputs["txt_ids"] = torch.zeros(6, 3)
            return model.eval(), inputs

        def split():
            model, inputs = inputs_and_model()
            model.enable_parallelism(config=ContextParallelConfig({how}=2))
            return model(**inputs, return_dict=False)[0]  # diffusers gathers tensors and tuples of them

        saw = {{}}
        with torch.no_grad():
            model, inputs = inputs_and_model()
            expected = model(**inputs).sample
            try:
                stock = split()
            except Exception as error:
                saw["stock refused"] = str(error)
            enable()
            try:
                with record() as calls:
                    got = split()
                saw["difference"] = float((got - expected).abs().max())
                saw["kernels"] = calls.kernels
                saw["reason"] = next(iter(calls)).reason
            except Exception as error:
                saw["refused"] = str(error)
            disable()
        print(json.dumps(saw), flush=True)
        dist.destroy_process_group()
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
