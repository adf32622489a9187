"""The timm models that the tests run: random weights, the published layers, few of them, and small images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SEED = 20261121


@dataclass(frozen=True)
class Arch:
    """A model; `row` is the call form that it stands for, `fast` is for every run of the tests."""

    name: str
    row: str
    size: int = 224
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fast: bool = False
    seed: int = SEED  #: of the images
    redirected: bool = True  #: False: its attention never goes through scaled_dot_product_attention

    def __str__(self) -> str:
        return self.name

    def build(self, **more: Any) -> nn.Module:
        import timm

        torch.manual_seed(SEED)
        model = timm.create_model(self.name, **self.kwargs, **more)
        assert isinstance(model, nn.Module)
        for name, parameter in model.named_parameters():  # what begins at zero would hide what it multiplies
            if parameter.ndim == 0 or not parameter.detach().abs().sum():
                nn.init.normal_(parameter, std=0.02)
            elif "gamma" in name or name.endswith(("ls1", "ls2")):
                nn.init.constant_(parameter, 0.5)
        return normalized(model, self.images())

    def images(self, batch: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)


def normalized(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """In eval mode, its batch norms knowing these images: else activations grow, and rounding errors with them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def small(size: int = 64, **kwargs: Any) -> dict[str, Any]:
    """Keywords of Arch for a model that takes `img_size`."""
    return {"size": size, "kwargs": {"img_size": size, **kwargs}}


SELF = "self-attention, (batch, heads, tokens, head_dim)"
BIAS = "trainable bias, (1, heads, tokens, tokens)"
WINDOWS = "windows in the batch, trainable bias, with a shift mask or without"
THREE = "3-D operands, bias that depends on the query"
LOWER = "mask of lower rank"
FIVE = "5-D operands"
SHORT = "fewer keys than queries"
ONE = "one query"
MULTI_QUERY = "one KV head, broadcast"
CHANNELS = "attention over channels, scale 1.0"
PADDED = "mask of padding by the lowest finite number"
CONV = "attention among convolutions"
PARTLY = "some modules call scaled_dot_product_attention, others never do"
NEVER = "never calls scaled_dot_product_attention"

ARCHS = (
    Arch("vit_tiny_patch16_224", SELF, **small(depth=2), fast=True),
    Arch("deit3_small_patch16_224", SELF, **small(depth=2)),
    Arch("deit_tiny_distilled_patch16_224", SELF, **small(depth=2)),
    Arch("vit_small_patch14_dinov2", SELF, **small(56, depth=2)),
    Arch("vit_small_patch16_dinov3", SELF, **small(depth=2)),
    Arch("eva02_tiny_patch14_224", SELF, **small(56, depth=2)),
    Arch("vit_base_patch16_siglip_224", SELF, **small(depth=1)),
    Arch("naflexvit_base_patch16_gap", SELF, size=64, kwargs={"depth": 1}),
    Arch("vit_small_patch16_36x1_224", SELF, **small(depth=2)),
    Arch("vit_small_patch16_18x2_224", SELF, **small(depth=2)),
    Arch("vit_base_patch16_xp_224", SELF, **small(depth=1)),
    Arch("vit_dpwee_patch16_reg1_gap_256", SELF, **small(depth=2)),
    Arch("vit_dwee_patch16_reg1_gap_256", SELF, **small(depth=2)),
    Arch("beit_base_patch16_224", BIAS, **small(depth=1), fast=True),
    Arch("beitv2_base_patch16_224", BIAS, **small(depth=1)),
    Arch("vit_relpos_small_patch16_224", BIAS, **small(depth=2)),
    Arch("vit_srelpos_small_patch16_224", BIAS, **small(depth=2), fast=True),
    Arch("vit_relpos_base_patch16_cls_224", BIAS, **small(depth=1)),
    Arch("swin_tiny_patch4_window7_224", WINDOWS, **small(112, depths=(2, 1), num_heads=(3, 6)), fast=True),
    Arch("swin_s3_tiny_224", WINDOWS, size=224, kwargs={"depths": (2, 2, 1, 1)}),
    Arch("maxvit_tiny_tf_224", WINDOWS, **small(64)),
    Arch("maxxvit_rmlp_nano_rw_256", WINDOWS, **small(64)),
    Arch("coatnet_0_rw_224", BIAS, **small(64)),
    Arch("coatnet_rmlp_1_rw_224", BIAS, **small(64)),
    Arch("samvit_base_patch16_224", THREE, **small(depth=2, global_attn_indexes=(1,)), fast=True),
    Arch("tiny_vit_5m_224", LOWER, size=224, kwargs={"depths": (1, 1, 1, 1)}, fast=True),
    Arch("twins_svt_small", FIVE, size=224, kwargs={"depths": (1, 1, 1, 1)}),
    # With others, two pixels under its max pool are so near that rounding decides which one gets the gradient.
    Arch("nest_tiny", FIVE, seed=2),
    Arch("hiera_tiny_224", FIVE, size=224, kwargs={"stages": (1, 1, 1, 1)}, fast=True),
    Arch("hieradet_small", FIVE),
    Arch("twins_pcpvt_small", SHORT, size=128, kwargs={"depths": (1, 1, 1, 1)}),
    Arch("pvt_v2_b0", SHORT, size=96, kwargs={"depths": (1, 1, 1, 1)}),
    Arch("nextvit_small", SHORT, size=64),
    Arch("cait_xxs24_224", ONE, **small(depth=1)),
    Arch("vit_base_patch16_siglip_gap_224", SELF, **small(depth=1)),
    Arch("mobilenetv4_hybrid_medium", MULTI_QUERY, size=96, fast=True),
    Arch("xcit_tiny_12_p16_224", CHANNELS, **small(depth=2), fast=True),
    Arch("visformer_tiny", SELF, **small(64)),
    Arch("davit_tiny", WINDOWS, size=112, kwargs={"depths": (1, 1, 1, 1)}),
    Arch("caformer_s18", CONV, size=64),
    Arch("fastvit_sa12", CONV, size=64),
    Arch("volo_d1_224", CONV, **small(64)),
    Arch("resnet50_clip", ONE, size=64),
    Arch("gemma4_vit_167m", SELF, size=96, kwargs={"depth": 2}),
    Arch("iformer_t", CONV, size=64),
    Arch("lowformer_b0", CONV, size=64),
    Arch("cpubone_nano", CONV, size=64),
    Arch("swinv2_tiny_window8_256", NEVER, **small(64, depths=(1, 1), num_heads=(3, 6)), redirected=False, fast=True),
    Arch("swinv2_cr_tiny_224", NEVER, size=224, kwargs={"depths": (1, 1, 1, 1)}, redirected=False),
    Arch("levit_128s", NEVER, size=224, redirected=False),
    Arch("gcvit_xxtiny", NEVER, size=224, redirected=False),
    Arch("mvitv2_tiny", NEVER, size=96, redirected=False),
    Arch("convit_tiny", NEVER, size=224, kwargs={"depth": 3, "local_up_to_layer": 2}, redirected=False),
    Arch("crossvit_tiny_240", PARTLY, size=240),
    Arch("edgenext_xx_small", NEVER, size=64, redirected=False),
    Arch("efficientformer_l1", NEVER, size=224, redirected=False),
    Arch("efficientformerv2_s0", NEVER, size=224, redirected=False),
    Arch("efficientvit_m0", NEVER, size=224, redirected=False),
    Arch("tnt_s_legacy_patch16_224", NEVER, **small(64, depth=1), redirected=False),
    Arch("mobilevitv2_050", NEVER, size=64, redirected=False),
    Arch("coat_tiny", NEVER, size=224, redirected=False),
    Arch("botnet26t_256", NEVER, size=256, redirected=False),
    Arch("halonet26t", NEVER, size=256, redirected=False),
    Arch("lambda_resnet26t", NEVER, size=256, redirected=False),
    Arch("shvit_s1", NEVER, size=128, redirected=False),
)
FAST = tuple(arch for arch in ARCHS if arch.fast)
