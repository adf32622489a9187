"""diffusers' models whose attention problems are recorded: see recorded_models.py, which has those of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from recorded_models import BF16, F16, F32, Entry, Run
from torch import nn

UNET_SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 2),  # 10 in the deepest
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}

Fill = Callable[..., torch.Tensor]


def run(ask: Callable[[Fill], dict[str, Any]]) -> Run:
    """Calls a model with what `ask(fill)` says; `fill(*shape)` makes a tensor of the model's dtype, or of `dtype=`."""

    def call(model: Any, dtype: torch.dtype, device: str) -> Any:
        def fill(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.ones(shape, dtype=dtype, device=device)

        return model(**ask(fill))

    return call


def flux(batch: int, side: int, text: int, *, guided: bool = True) -> Run:
    """`side` latent patches of 16 pixels each way."""
    return run(
        lambda fill: {
            "hidden_states": fill(batch, side * side, 64),
            "encoder_hidden_states": fill(batch, text, 4096),
            "pooled_projections": fill(batch, 768),
            "timestep": fill(batch),
            "img_ids": fill(side * side, 3),
            "txt_ids": fill(text, 3),
            "guidance": fill(batch) if guided else None,
        }
    )


def sd3(batch: int, side: int) -> Run:
    """333 tokens: 77 of CLIP's and 256 of T5's."""
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 16, side, side),
            "encoder_hidden_states": fill(batch, 333, 4096),
            "pooled_projections": fill(batch, 2048),
            "timestep": fill(batch),
        }
    )


def video(batch: int, frames: int, height: int, width: int) -> Run:
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 16, frames, height, width),
            "timestep": fill(batch, dtype=torch.int64),
            "encoder_hidden_states": fill(batch, 512, 4096),
        }
    )


def unet(batch: int, side: int, width: int, *, padded: bool = False, sdxl: bool = False) -> Run:
    def ask(fill: Fill) -> dict[str, Any]:
        added = {"text_embeds": fill(batch, 1280), "time_ids": fill(batch, 6)}
        return {
            "sample": fill(batch, 4, side, side),
            "timestep": fill(batch),
            "encoder_hidden_states": fill(batch, 77, width),
            **({"added_cond_kwargs": added} if sdxl else {}),
            **({"encoder_attention_mask": fill(batch, 77, dtype=torch.bool)} if padded else {}),
        }

    return run(ask)


def pixart(batch: int, side: int, text: int) -> Run:
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 4, side, side),
            "encoder_hidden_states": fill(batch, text, 4096),
            "timestep": fill(batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": fill(batch, text, dtype=torch.int64),
        }
    )


def lumina(batch: int, side: int, text: int) -> Run:
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 16, side, side),
            "timestep": fill(batch),
            "encoder_hidden_states": fill(batch, text, 2304),
            "encoder_attention_mask": fill(batch, text, dtype=torch.bool),
        }
    )


def aura(batch: int, side: int) -> Run:
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 4, side, side),
            "encoder_hidden_states": fill(batch, 256, 2048),
            "timestep": fill(batch),
        }
    )


def cogvideo(batch: int) -> Run:
    """49 frames of 480 x 720."""
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 13, 16, 60, 90),
            "encoder_hidden_states": fill(batch, 226, 4096),
            "timestep": fill(batch, dtype=torch.int64),
        }
    )


def ltx(batch: int) -> Run:
    """161 frames of 512 x 704."""
    return run(
        lambda fill: {
            "hidden_states": fill(batch, 21 * 16 * 22, 128),
            "encoder_hidden_states": fill(batch, 128, 4096),
            "timestep": fill(batch),
            "encoder_attention_mask": fill(batch, 128, dtype=torch.int64),
            "num_frames": 21,
            "height": 16,
            "width": 22,
        }
    )


def vae(batch: int, side: int) -> Run:
    return run(lambda fill: {"sample": fill(batch, 3, side, side)})


#: name -> (class, configuration, dtype, modes)
DIFFUSERS: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Run]]] = {
    "FLUX.1-dev": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        BF16,
        {"forward": flux(1, 64, 512), "forward, 512 pixels": flux(1, 32, 512), "train": flux(1, 32, 512)},
    ),
    "FLUX.1-schnell": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1},
        BF16,
        {
            "forward": flux(1, 64, 256, guided=False),
            "forward, 256 pixels": flux(1, 16, 256, guided=False),
        },
    ),
    "stable-diffusion-3-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        F16,
        {"forward": sd3(2, 128), "forward, 512 pixels": sd3(2, 64), "train": sd3(1, 64)},
    ),
    "stable-diffusion-3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        BF16,
        {"forward": sd3(2, 128)},
    ),
    "stable-diffusion-3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        BF16,
        {"forward": sd3(2, 128)},
    ),
    "Wan2.1-T2V-1.3B": (
        "WanTransformer3DModel",
        {"num_layers": 1, "num_attention_heads": 12, "ffn_dim": 8960},
        BF16,
        {"forward": video(1, 21, 60, 104), "forward, one frame": video(1, 1, 60, 104), "train": video(1, 5, 60, 104)},
    ),
    "Wan2.1-T2V-14B": ("WanTransformer3DModel", {"num_layers": 1}, BF16, {"forward": video(1, 21, 90, 160)}),
    "stable-diffusion-xl-base-1.0": (
        "UNet2DConditionModel",
        UNET_SDXL,
        F16,
        {
            "forward": unet(2, 128, 2048, sdxl=True),
            "forward, 512 pixels": unet(2, 64, 2048, sdxl=True),
            "forward, padded": unet(2, 64, 2048, padded=True, sdxl=True),
            "train": unet(1, 64, 2048, sdxl=True),
        },
    ),
    "stable-diffusion-v1-5": (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        F32,
        {"forward": unet(2, 64, 768), "forward, 256 pixels": unet(1, 32, 768), "train": unet(1, 64, 768)},
    ),
    "stable-diffusion-2-1": (
        "UNet2DConditionModel",
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        F16,
        {"forward": unet(2, 96, 1024)},
    ),
    "sdxl-vae": ("AutoencoderKL", VAE, F32, {"forward": vae(1, 512), "train": vae(1, 256)}),
    "PixArt-alpha-512": (
        "PixArtTransformer2DModel",
        {"num_layers": 2, "sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
        F16,
        {"forward": pixart(2, 64, 120)},
    ),
    "PixArt-sigma-1024": (
        "PixArtTransformer2DModel",
        {"num_layers": 2, "sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
        F16,
        {"forward": pixart(2, 128, 300)},
    ),
    "Lumina-Image-2.0": (
        "Lumina2Transformer2DModel",
        {"num_layers": 2, "num_refiner_layers": 1, "cap_feat_dim": 2304},
        BF16,
        {"forward, 512 pixels": lumina(1, 64, 128)},
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 4096},
        F16,
        {"forward": aura(1, 64)},
    ),
    "CogVideoX-2b": ("CogVideoXTransformer3DModel", {"num_layers": 1}, F16, {"forward": cogvideo(1)}),
    "LTX-Video": ("LTXVideoTransformer3DModel", {"num_layers": 1}, BF16, {"forward": ltx(1), "train": ltx(1)}),
}

#: Their forward reads lengths from a mask, which the meta device does not have.
READS_NUMBERS = ("Lumina-Image-2.0",)


def of_diffusers() -> Iterator[tuple[str, Entry]]:
    import diffusers

    for name, (model_class, config, dtype, modes) in DIFFUSERS.items():

        def build(model_class: str = model_class, config: dict[str, Any] = config) -> nn.Module:
            model = getattr(diffusers, model_class)(**config)
            assert isinstance(model, nn.Module)
            return model

        yield name, Entry(build, dtype, modes, only_meta=name not in READS_NUMBERS)
