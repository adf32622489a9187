"""Modules of timm that take a softmax and never call scaled_dot_product_attention: what each computes instead.

A module that is not listed is reported all the same, without the second half of its reason.
"""

from __future__ import annotations

NEVER = "never calls scaled_dot_product_attention"

#: Attention, but multiplied out by the module: module and class, below `timm.` -> what it does.
OWN_ATTENTION = {
    "layers.attention2d.MultiQueryAttentionV2": "one KV head, by einsum, with the softmax in between",
    "layers.bottleneck_attn.BottleneckAttn": "adds relative positions that depend on the query",
    "layers.halo_attn.HaloAttn": "adds relative positions that depend on the query, over blocks with halos",
    "layers.non_local_attn.NonLocalAttn": "attention over pixels, by its own products",
    "models.cait.TalkingHeadAttn": "mixes the heads before and after the softmax",
    "models.convit.GPSA": "mixes two softmaxes, of content and of positions, by a gate",
    "models.convit.MHSA": "multiplies and takes the softmax itself",
    "models.crossvit.CrossAttention": "multiplies and takes the softmax itself, with one query",
    "models.csatv2.SpatialTransformerBlock": "multiplies and takes the softmax itself, with one head",
    "models.efficientformer.Attention": "adds a table of biases and takes the softmax itself",
    "models.efficientformer_v2.Attention2d": "mixes the heads before and after the softmax",
    "models.efficientformer_v2.Attention2dDownsample": "adds a table of biases and takes the softmax itself",
    "models.efficientvit_msra.CascadedGroupAttention": "adds a table of biases, one head after the other",
    "models.gcvit.WindowAttentionGlobal": "adds a table of biases and takes the softmax itself",
    "models.levit.Attention": "adds a table of biases and takes the softmax itself",
    "models.levit.AttentionDownsample": "adds a table of biases and takes the softmax itself",
    "models.mvitv2.MultiScaleAttention": "adds relative positions that depend on the query",
    "models.mvitv2.MultiScaleAttentionPoolFirst": "adds relative positions that depend on the query",
    "models.shvit.SHSA": "multiplies and takes the softmax itself, with one head",
    "models.swin_transformer_v2.WindowAttention": "cosine attention with a learned scale per head",
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": "cosine attention with a learned scale per head",
    "models.tnt.Attention": "multiplies and takes the softmax itself",
    "models.volo.ClassAttention": "multiplies and takes the softmax itself, with one query",
}

#: A softmax of something else than logits of queries and keys.
OTHER_SOFTMAX = {
    "layers.global_context.GlobalContext": "a softmax over pixels that weighs them, without queries",
    "layers.lambda_layer.LambdaLayer": "a linear layer made of the keys: a softmax of the keys alone",
    "layers.selective_kernel.SelectiveKernelAttn": "a softmax over the paths of a convolution",
    "layers.split_attn.RadixSoftmax": "a softmax over the splits of a convolution",
    "models.coat.FactorAttnConvRelPosEnc": "linear attention: a softmax of the keys alone",
    "models.davit.ChannelAttention": "attention over channels, by its own products",
    "models.davit.ChannelAttentionV2": "attention over channels, by its own products",
    "models.edgenext.CrossCovarianceAttn": "attention over channels with a learned scale per head",
    "models.efficientvim.EfficientViM": "a softmax over the weights of the outputs",
    "models.efficientvim.EfficientViMDistilled": "a softmax over the weights of the outputs",
    "models.efficientvim.HSMSSD": "a softmax within a state space model",
    "models.mobilevit.LinearSelfAttention": "linear attention: a softmax of one score per pixel",
    "models.volo.OutlookAttention": "weights straight from the query, without keys",
}


def why_never(cls: type) -> str:
    """Why a class that takes a softmax by itself is left alone."""
    for owner in cls.__mro__:
        name = f"{owner.__module__}.{owner.__qualname__}".removeprefix("timm.")
        what = OWN_ATTENTION.get(name) or OTHER_SOFTMAX.get(name)
        if what is not None:
            return f"{NEVER}: {what}"
    return f"{NEVER}: takes a softmax itself"
