"""The models whose attention problems are recorded, and how each is run. Used by record_problems.py.

transformers and diffusers get the published configurations by hand, since nothing is downloaded; what is not named has
the published value as its default. Only the number of layers differs: two, or as many as are of different kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Run = Callable[[Any, torch.dtype, str], Any]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    modes: Mapping[str, Run]  #: those that begin with "train" run in training mode, with gradients
    only_meta: bool = False  #: too large for a machine's memory


# timm. Training is in bfloat16, as by its train script with --model-dtype bfloat16.

TIMM = (
    *("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_base_patch16_384"),
    *("vit_large_patch16_384", "vit_tiny_patch16_224", "vit_base_patch32_224", "vit_base_patch8_224"),
    *("vit_so400m_patch14_siglip_224", "vit_base_patch16_siglip_256", "aimv2_large_patch14_224", "flexivit_base"),
    *("vit_base_patch14_reg4_dinov2", "deit3_base_patch16_224", "deit3_large_patch16_384", "deit3_small_patch16_224"),
    *("vit_small_patch16_dinov3", "vit_base_patch16_dinov3", "vit_7b_patch16_dinov3", "eva02_base_patch14_224"),
    *("eva02_large_patch14_448", "eva02_tiny_patch14_336", "eva02_base_patch16_clip_224"),
    *("beit_base_patch16_224", "beit_large_patch16_384", "beit3_base_patch16_224"),
    *(
        "swin_tiny_patch4_window7_224",
        "swin_base_patch4_window12_384",
        "swin_large_patch4_window7_224",
        "swin_s3_tiny_224",
    ),
    *("maxvit_tiny_tf_224", "maxvit_rmlp_small_rw_224", "coatnet_0_224", "coatnet_rmlp_1_rw_224", "coatnet_2_224"),
    *("vit_relpos_base_patch16_224", "vit_relpos_small_patch16_224", "vit_srelpos_medium_patch16_224"),
    *("vit_relpos_base_patch16_plus_240", "vit_relpos_base_patch16_cls_224"),
    *("samvit_base_patch16", "samvit_base_patch16_224", "tiny_vit_5m_224", "tiny_vit_21m_384"),
    *("twins_pcpvt_small", "twins_svt_small", "twins_svt_large", "nest_tiny", "nest_base"),
    *("hiera_tiny_224", "hiera_base_224", "hiera_base_abswin_256", "hieradet_small"),
    *("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5", "cait_s24_224", "cait_xxs24_384", "xcit_small_12_p16_224"),
    *("mobilenetv4_hybrid_medium", "mobilenetv4_hybrid_large", "naflexvit_base_patch16_gap"),
    *("naflexvit_base_patch16_siglip", "davit_tiny", "fastvit_sa12", "nextvit_small", "volo_d1_224", "visformer_small"),
    *("vit_base_patch16_clip_224", "vit_medium_patch16_gap_240", "resnet50_clip", "caformer_s18"),
)


def of_timm() -> Iterator[tuple[str, Entry]]:
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(True, experimental=True)  # Swin and XCiT use torch's attention only then
    for name in TIMM:
        config = timm.get_pretrained_cfg(name)
        modes = {"forward": image(config.input_size, 1)}
        yield name, Entry(lambda name=name: timm.create_model(name), F32, modes)  # type: ignore[misc]
        yield name, Entry(lambda name=name: timm.create_model(name), BF16, {"train": image(config.input_size, 2)})  # type: ignore[misc]


def image(size: tuple[int, ...], batch: int) -> Run:
    return lambda model, dtype, device: model(torch.zeros(batch, *size, dtype=dtype, device=device))


def define_torchvision_ops() -> None:
    """A torchvision built for CUDA can be imported beside a CPU build of torch where these two have a schema."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for schema in (
            "nms(Tensor dets, Tensor scores, float t) -> Tensor",
            "qnms(Tensor d, Tensor s, float t) -> Tensor",
        ):
            _OPS.define(schema)


_OPS = torch.library.Library("torchvision", "FRAGMENT")

# transformers: name -> (model class, configuration class, configuration, dtype, modes).

NAME = "recording"
#: Their attention is not called by transformers' registry.
NO_REGISTRY = ("FalconModel",)
LLAMA3 = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
ENCODER, DECODER, LONG, TRANSLATOR, PICTURE, SOUND = "encoder", "decoder", "long", "translator", "picture", "sound"

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], torch.dtype, str]] = {
    "bert-base-uncased": ("BertModel", "BertConfig", {}, F32, ENCODER),
    "bert-large-uncased": (
        "BertModel",
        "BertConfig",
        {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
        F32,
        ENCODER,
    ),
    "all-MiniLM-L6-v2": (
        "BertModel",
        "BertConfig",
        {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
        F32,
        ENCODER,
    ),
    "distilbert-base-uncased": ("DistilBertModel", "DistilBertConfig", {}, F32, ENCODER),
    "ModernBERT-base": ("ModernBertModel", "ModernBertConfig", {}, BF16, ENCODER),
    "ModernBERT-large": (
        "ModernBertModel",
        "ModernBertConfig",
        {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2624},
        BF16,
        ENCODER,
    ),
    "Llama-3-8B": (
        "LlamaModel",
        "LlamaConfig",
        LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        BF16,
        DECODER,
    ),
    "Llama-3-70B": (
        "LlamaModel",
        "LlamaConfig",
        LLAMA3 | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
        BF16,
        DECODER,
    ),
    "Llama-3.2-1B": (
        "LlamaModel",
        "LlamaConfig",
        LLAMA3
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
        BF16,
        DECODER,
    ),
    "Mistral-7B-v0.1": ("MistralModel", "MistralConfig", {}, BF16, LONG),
    "gemma-2-2b": (
        "Gemma2Model",
        "Gemma2Config",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        BF16,
        LONG,
    ),
    "gemma-2-9b": (
        "Gemma2Model",
        "Gemma2Config",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        BF16,
        LONG,
    ),
    "gemma-2-27b": (
        "Gemma2Model",
        "Gemma2Config",
        {
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "sliding_window": 4096,
        },
        BF16,
        LONG,
    ),
    "gemma-3-1b": (
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        BF16,
        DECODER,
    ),
    "Qwen2.5-0.5B": (
        "Qwen2Model",
        "Qwen2Config",
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
        BF16,
        DECODER,
    ),
    "Qwen2.5-7B": (
        "Qwen2Model",
        "Qwen2Config",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        BF16,
        DECODER,
    ),
    "Qwen3-8B": (
        "Qwen3Model",
        "Qwen3Config",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8},
        BF16,
        DECODER,
    ),
    "gpt2": ("GPT2Model", "GPT2Config", {}, F32, DECODER),
    "gpt2-xl": ("GPT2Model", "GPT2Config", {"n_embd": 1600, "n_head": 25}, F32, DECODER),
    "falcon-7b": ("FalconModel", "FalconConfig", {}, BF16, DECODER),
    "opt-1.3b": (
        "OPTModel",
        "OPTConfig",
        {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
        F16,
        DECODER,
    ),
    "pythia-1.4b": (
        "GPTNeoXModel",
        "GPTNeoXConfig",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16},
        F16,
        DECODER,
    ),
    "t5-small": ("T5Model", "T5Config", {}, F32, TRANSLATOR),
    "t5-base": ("T5Model", "T5Config", {"d_model": 768, "d_ff": 3072, "num_heads": 12}, F32, TRANSLATOR),
    "flan-t5-xl": (
        "T5Model",
        "T5Config",
        {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "feed_forward_proj": "gated-gelu"},
        BF16,
        TRANSLATOR,
    ),
    "bart-large": ("BartModel", "BartConfig", {}, F32, TRANSLATOR),
    "vit-base-patch16-224": ("ViTModel", "ViTConfig", {}, F32, PICTURE),
    "dinov2-base": ("Dinov2Model", "Dinov2Config", {"image_size": 518, "patch_size": 14}, F32, PICTURE),
    "clip-vit-large-patch14": (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14},
        F16,
        PICTURE,
    ),
    "whisper-tiny": ("WhisperModel", "WhisperConfig", {}, F32, SOUND),
    "whisper-large-v3": (
        "WhisperModel",
        "WhisperConfig",
        {
            "num_mel_bins": 128,
            "d_model": 1280,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
        },
        F16,
        SOUND,
    ),
}


def register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Makes `attn_implementation=NAME` run these."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def of_transformers() -> Iterator[tuple[str, Entry]]:
    import transformers

    depth = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    for name, (model_class, config_class, changes, dtype, kind) in TRANSFORMERS.items():
        made = getattr(transformers, config_class)
        known = made().to_dict()
        shallow = {key: 2 for key in (*depth, "n_layers") if key in known}

        def build(made: Any = made, model_class: str = model_class, config: Any = shallow | changes) -> nn.Module:
            by = "sdpa" if model_class in NO_REGISTRY else NAME
            model = getattr(transformers, model_class)._from_config(made(**config), attn_implementation=by)
            assert isinstance(model, nn.Module)
            return model

        yield name, Entry(build, dtype, MODES[kind])


def tokens(batch: int, length: int, padded: bool = False) -> Run:
    """A text, as a whole."""

    def run(model: Any, dtype: torch.dtype, device: str) -> Any:
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        return model(input_ids=ids, **({"attention_mask": torch.ones_like(ids)} if padded else {}))

    return run


def decode(batch: int, length: int, padded: bool = False) -> Run:
    """One token more, after a prefill with a cache."""

    def run(model: Any, dtype: torch.dtype, device: str) -> Any:
        ids = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        ones = torch.ones_like(ids)
        mask = {"attention_mask": ones[:, :length]} if padded else {}
        cache = model(input_ids=ids[:, :length], use_cache=True, **mask).past_key_values
        mask = {"attention_mask": ones} if padded else {}
        return model(input_ids=ids[:, length:], past_key_values=cache, use_cache=True, **mask)

    return run


def translated(batch: int, source: int, target: int, padded: bool = False) -> Run:
    """Encoder and decoder; then one token more, by the decoder's cache."""

    def run(model: Any, dtype: torch.dtype, device: str) -> Any:
        ids = torch.zeros(batch, source, dtype=torch.int64, device=device)
        out_ids = torch.zeros(batch, target, dtype=torch.int64, device=device)
        mask = {"attention_mask": torch.ones_like(ids)} if padded else {}
        found = model(input_ids=ids, decoder_input_ids=out_ids, use_cache=not model.training, **mask)
        if model.training:
            return found
        more = {"encoder_outputs": (found.encoder_last_hidden_state,), "past_key_values": found.past_key_values}
        return model(decoder_input_ids=out_ids[:, :1], use_cache=True, **more, **mask)

    return run


def picture(batch: int) -> Run:
    def run(model: Any, dtype: torch.dtype, device: str) -> Any:
        size = model.config.image_size
        return model(pixel_values=torch.zeros(batch, 3, size, size, dtype=dtype, device=device))

    return run


def sound(batch: int, target: int) -> Run:
    def run(model: Any, dtype: torch.dtype, device: str) -> Any:
        features = torch.zeros(batch, model.config.num_mel_bins, 3000, dtype=dtype, device=device)
        ids = torch.zeros(batch, target, dtype=torch.int64, device=device)
        found = model(input_features=features, decoder_input_ids=ids, use_cache=not model.training)
        if model.training:
            return found
        more = {"encoder_outputs": (found.encoder_last_hidden_state,), "past_key_values": found.past_key_values}
        return model(decoder_input_ids=ids[:, :1], use_cache=True, **more)

    return run


MODES: dict[str, dict[str, Run]] = {
    ENCODER: {
        "forward": tokens(1, 128),
        "forward, padded": tokens(4, 128, padded=True),
        "forward, long": tokens(1, 512),
        "train": tokens(8, 128, padded=True),
    },
    DECODER: {
        "prefill": tokens(1, 512),
        "prefill, padded": tokens(4, 128, padded=True),
        "decode": decode(1, 512),
        "decode, padded": decode(4, 128, padded=True),
        "train": tokens(1, 1024),
    },
    LONG: {
        "prefill": tokens(1, 512),
        "prefill, long": tokens(1, 6144),
        "decode": decode(1, 512),
        "decode, long": decode(1, 6144),
        "train": tokens(1, 1024),
    },
    TRANSLATOR: {
        "forward": translated(1, 256, 64),
        "forward, padded": translated(4, 128, 32, padded=True),
        "train": translated(2, 256, 64, padded=True),
    },
    PICTURE: {"forward": picture(1), "train": picture(2)},
    SOUND: {"forward": sound(1, 16), "train": sound(2, 64)},
}


def entries(library: str) -> Iterator[tuple[str, Entry]]:
    """The models of a library, by name; some more than once, in another dtype."""
    if library == "diffusers":
        from recorded_diffusers import of_diffusers

        return of_diffusers()
    return of_timm() if library == "timm" else of_transformers()
