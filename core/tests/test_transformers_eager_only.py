"""transformers: models that are made for "eager" alone compute the same when they are loaded with "attn".

Some add their mask to logits of their own, some are causal in name only. Without what "eager" makes of a mask, padding
and the future would silently be attended.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attn-core[demo]'"
)

from attn_core import record  # noqa: E402
from attn_core.integrations.transformers import disable, enable, masks  # noqa: E402

SEED = 20261122
ATOL = 1e-5
SEQLEN = 11
WIDTH = {"hidden_size": 64, "intermediate_size": 64}
TEXT = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, **WIDTH}
IMAGES = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
PADDINGS = {"none": slice(0, 0), "left": slice(0, 4), "right": slice(7, 11)}


def bloom():
    return transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), transformers.BloomModel


def gpt_neox_japanese():
    config = transformers.GPTNeoXJapaneseConfig(**TEXT | {"intermediate_multiple_size": 2})
    return config, transformers.GPTNeoXJapaneseModel


def git():
    vision = {**WIDTH, **IMAGES, "num_attention_heads": 4}
    config = transformers.GitConfig(**TEXT, vision_config=vision)
    return config, transformers.GitModel


def splinter():
    return transformers.SplinterConfig(**TEXT), transformers.SplinterModel


def markuplm():
    return transformers.MarkupLMConfig(**TEXT, max_depth=2), transformers.MarkupLMModel


def bridge_tower():
    config = transformers.BridgeTowerConfig(
        **WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        text_config=TEXT | {"num_hidden_layers": 3},
        vision_config={"hidden_size": 64, **IMAGES, "num_hidden_layers": 3},
    )
    return config, transformers.BridgeTowerModel


#: name -> (configuration and class, how many of its calls are attn's)
MODELS = {
    "bloom": (bloom, 0),
    "gpt-neox-japanese": (gpt_neox_japanese, 0),
    "splinter": (splinter, 2),
    "markuplm": (markuplm, 2),
    "bridgetower": (bridge_tower, 11),
}


@pytest.fixture(autouse=True)
def enabled():
    enable()
    yield
    disable()


def made(build, implementation):
    config, cls = build()
    torch.manual_seed(SEED)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # enough that what is attended shows
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def inputs(padding):
    torch.manual_seed(SEED)
    mask = torch.ones(2, SEQLEN, dtype=torch.long)
    mask[0, PADDINGS[padding]] = 0
    return {"input_ids": torch.randint(5, 100, (2, SEQLEN)), "attention_mask": mask}


def output(model, given):
    """At the tokens that are there."""
    if isinstance(model, transformers.BridgeTowerModel):
        torch.manual_seed(SEED)
        given = {**given, "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        return model(**given)[0][given["attention_mask"].bool()]


@pytest.mark.parametrize("least_keys", [512, 2], ids=["dense masks", "masks that say what they mean"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_loaded_with_attn_gives_the_same_as_with_eager(monkeypatch, name, padding, least_keys):
    monkeypatch.setattr(masks, "LEAST_KEYS", least_keys)
    (build, count), given = MODELS[name], inputs(padding)
    eager = output(made(build, "eager"), given)
    model = made(build, "attn")
    assert model.config._attn_implementation == "attn"
    with record() as calls:
        torch.testing.assert_close(output(model, given), eager, atol=ATOL, rtol=0)
    assert sum(calls.kernels.values()) == count, calls


@pytest.mark.parametrize("padding", PADDINGS)
def test_so_does_one_that_is_switched_to_it(padding):
    model, given = made(git, "eager"), inputs(padding)
    eager = output(model, given)
    model.set_attn_implementation("attn")
    assert model.config._attn_implementation == "attn"
    torch.testing.assert_close(output(model, given), eager, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "splinter"])
def test_so_does_one_that_is_compiled(name):
    (build, _), given = MODELS[name], inputs("left")
    eager = output(made(build, "eager"), given)
    torch.compiler.reset()
    compiled = torch.compile(made(build, "attn"), backend="eager")
    torch.testing.assert_close(output(compiled, given), eager, atol=ATOL, rtol=0)


def test_a_name_of_ones_own_is_no_exception():
    enable("attn-mine", prefer="torch/math")
    given = inputs("none")
    eager = output(made(splinter, "eager"), given)
    with record() as calls:
        torch.testing.assert_close(output(made(splinter, "attn-mine"), given), eager, atol=ATOL, rtol=0)
    assert calls.kernels == {"torch/math": 2}


def test_a_model_with_a_softcap_keeps_the_masks_by_which_kernels_skip():
    options = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = transformers.Gemma2Config(**TEXT, **options)
    with record() as calls:
        output(made(lambda: (config, transformers.Gemma2Model), "attn"), inputs("none"))
    assert all("Causal" in str(row.problem) for row in calls), calls
