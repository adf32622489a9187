"""transformers: models that read pictures and text, by attn beside eager attention; run by `nox -s transformers`.

Some let the tokens of a picture attend to each other both ways, some number them in two axes, some read the picture by
cross-attention. Random weights, large enough that a wrong mask would be seen: each test looks at that, too.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers as tf
from attn_core import record
from attn_core.integrations import transformers as attn_transformers
from attn_core.integrations.transformers import masks

SEED = 20261121
ATOL = 1e-5
LENGTH, BEGIN = 40, 14  #: tokens, and where the picture's begin
PADDED = 9  #: tokens at the left of the second text
PICTURE, BEFORE, BEHIND, FILM = 150, 148, 149, 151  #: tokens that stand for a picture, around one, and for a film
NEW = 5

TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
AXES = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = TEXT | {"head_dim": 8, "rope_scaling": AXES, "rope_parameters": AXES}
QWEN_EYE = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}


def llava():
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**EYE), text_config=tf.LlamaConfig(**TEXT), image_token_index=PICTURE
    )


def gemma3():
    layers = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**TEXT, **layers),
        vision_config=tf.SiglipVisionConfig(**EYE),
        mm_tokens_per_image=16,
        image_token_index=PICTURE,
        boi_token_index=BEFORE,
        eoi_token_index=BEHIND,
    )


def pali_gemma():
    eye = tf.SiglipVisionConfig(**EYE, projection_dim=32)
    text = tf.GemmaConfig(**TEXT, head_dim=8)
    return tf.PaliGemmaConfig(vision_config=eye, text_config=text, image_token_index=PICTURE, projection_dim=32)


def qwen(name, **eye):
    return getattr(tf, f"{name}Config")(
        text_config=QWEN,
        vision_config=QWEN_EYE | eye,
        image_token_id=PICTURE,
        video_token_id=FILM,
        vision_start_token_id=BEFORE,
        vision_end_token_id=BEHIND,
    )


def intern_vl():
    eye = EYE | {"image_size": [32, 32], "patch_size": [4, 4]}
    return tf.InternVLConfig(vision_config=eye, text_config=tf.Qwen2Config(**TEXT), image_token_id=PICTURE)


def idefics3():
    return tf.Idefics3Config(
        vision_config=dict(EYE), text_config=tf.LlamaConfig(**TEXT), image_token_id=PICTURE, scale_factor=2
    )


def mllama():
    eye = {name: EYE[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size")}
    eye |= {"patch_size": 8, "attention_heads": 4, "num_global_layers": 1, "max_num_tiles": 1, "vision_output_dim": 64}
    eye |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return tf.MllamaConfig(vision_config=eye, text_config=text, image_token_index=PICTURE)


#: model -> its configuration, and how many tokens stand for a picture
MODELS = {
    "Llava": (llava, 16),
    "Gemma3": (gemma3, 16),
    "PaliGemma": (pali_gemma, 16),
    "Qwen2VL": (lambda: qwen("Qwen2VL", embed_dim=32, mlp_ratio=2), 16),
    "Qwen2_5_VL": (
        lambda: qwen("Qwen2_5_VL", out_hidden_size=32, intermediate_size=64, fullatt_block_indexes=[1], window_size=16),
        16,
    ),
    "Qwen3VL": (
        lambda: qwen(
            "Qwen3VL",
            out_hidden_size=32,
            intermediate_size=64,
            deepstack_visual_indexes=[0],
            num_position_embeddings=64,
        ),
        16,
    ),
    "InternVL": (intern_vl, 16),
    "Idefics3": (idefics3, 4),
    "Mllama": (mllama, 1),
}
#: Those in which the tokens of a picture attend to each other both ways.
BOTH_WAYS = ("Gemma3", "PaliGemma")


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.setattr(masks, "LEAST_KEYS", 2)
    attn_transformers.enable()
    yield
    attn_transformers.disable()


def made(name):
    """The model with random weights, set to eager attention."""
    torch.manual_seed(SEED)
    model = getattr(tf, f"{name}ForConditionalGeneration")(MODELS[name][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.set_attn_implementation("eager")
    return model


def inputs(name):
    """Two texts with a picture each, the second padded at the left."""
    torch.manual_seed(SEED)
    tokens, mask = torch.randint(3, 140, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.long)
    end = BEGIN + MODELS[name][1]
    tokens[:, BEGIN - 1], tokens[:, BEGIN:end], tokens[:, end] = BEFORE, PICTURE, BEHIND
    tokens[1, :PADDED] = mask[1, :PADDED] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    if name in BOTH_WAYS:
        given["token_type_ids"] = (tokens == PICTURE).long()
    if name.startswith("Qwen"):
        given |= {"pixel_values": torch.randn(128, 96), "image_grid_thw": torch.tensor([[1, 8, 8]] * 2)}
        given["mm_token_type_ids"] = (tokens == PICTURE).long()
    elif name == "Idefics3":
        given["pixel_values"] = torch.randn(2, 1, 3, 32, 32)
    elif name == "Mllama":
        given["pixel_values"] = torch.randn(2, 1, 1, 3, 32, 32)
        given["aspect_ratio_ids"] = torch.ones(2, 1, dtype=torch.long)
        given["aspect_ratio_mask"] = torch.ones(2, 1, 1, dtype=torch.long)
        sees = torch.arange(LENGTH) >= BEGIN
        given["cross_attention_mask"] = sees.long().view(1, LENGTH, 1, 1).expand(2, -1, 1, 1).clone()
    else:
        given["pixel_values"] = torch.randn(2, 3, 32, 32)
    return given


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager_attention(name):
    model, given = made(name), inputs(name)
    there = given["attention_mask"].bool()

    def logits(**changed):
        return model(**given | changed).logits[there]

    with torch.no_grad():
        eager = logits()
        unpadded = logits(attention_mask=torch.ones_like(given["attention_mask"]))
        assert (unpadded - eager).abs().max() > 1000 * ATOL, "else padding that is read would not be seen"
        if name in BOTH_WAYS:
            other_way = logits(token_type_ids=1 - given["token_type_ids"])
            assert (other_way - eager).abs().max() > 1000 * ATOL, "else a causal picture would not be seen"
        model.set_attn_implementation("attn")
        with record() as calls:
            torch.testing.assert_close(logits(), eager, atol=ATOL, rtol=1e-4)
    assert sum(calls.kernels.values()) >= 4, "both the picture and the text"
    assert "torch (stock)" not in calls.kernels


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_eager_attention(name):
    model, given = made(name), inputs(name)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    eager = model.generate(**given, **options)
    model.set_attn_implementation("attn")
    assert torch.equal(model.generate(**given, **options), eager)
