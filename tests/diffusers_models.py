"""Small models of diffusers with random weights, one of each family, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SEED = 20261121
BATCH = 2

Made = tuple[Any, dict[str, Any]]


def flux() -> Made:
    """Two calls of the dispatcher, by a processor that chooses a backend."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(SEED)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 16, 4),
        "encoder_hidden_states": torch.randn(BATCH, 5, 32),
        "pooled_projections": torch.randn(BATCH, 32),
        "timestep": torch.tensor([1.0, 2.0]),
        "img_ids": torch.randn(16, 3).round(),
        "txt_ids": torch.zeros(5, 3),
    }


def stable_diffusion_3() -> Made:
    """Three calls of torch's scaled_dot_product_attention, by processors that know no backends."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(SEED)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 5, 32),
        "pooled_projections": torch.randn(BATCH, 64),
        "timestep": torch.tensor([1.0, 2.0]),
    }


def wan() -> Made:
    """A video of two frames: self-attention and cross-attention, by the dispatcher."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(SEED)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, 2, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
    }


def unet() -> Made:
    """Self-attention, and cross-attention with padding, by processors that know no backends."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(SEED)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return model, {
        "sample": torch.randn(BATCH, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(BATCH, 5, 12),
        "encoder_attention_mask": torch.arange(5) < torch.tensor([[5], [3]]),
    }


def autoencoder() -> Made:
    """One head as wide as the channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
    )
    return model, {"sample": torch.randn(BATCH, 3, 8, 8)}


MODELS: dict[str, Callable[[], Made]] = {
    "flux": flux,
    "stable-diffusion-3": stable_diffusion_3,
    "wan": wan,
    "unet": unet,
    "autoencoder": autoencoder,
}


def run(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output of a model made anew, and the gradient of every parameter that has one, of a training step."""
    model, inputs = MODELS[name]()
    model.train()
    out = model(**inputs).sample
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients
