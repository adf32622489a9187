"""transformers: a model's results stay what they are when attn runs its attention, and no argument vanishes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attn-core[demo]'"
)

from attn_core import (  # noqa: E402
    InputError,
    IntegrationWarning,
    KernelRefusedError,
    UnknownKernelError,
    prefer,
    record,
    reference_attention,
)
from attn_core.integrations import transformers as integration  # noqa: E402
from attn_core.integrations.transformers import attention_forward, disable, enable  # noqa: E402
from transformers import modeling_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS  # noqa: E402

ATTENTIONS = modeling_utils.ALL_ATTENTION_FUNCTIONS
SEED = 20261121
ATOL = 1e-5

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
ENCODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODERN_BERT = {"num_hidden_layers": 4, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

#: Random weights, real architectures. name -> (config, class)
CAUSAL_LMS = {
    "llama-gqa": lambda: (transformers.LlamaConfig(**DECODER), transformers.LlamaForCausalLM),
    "mistral-window": lambda: (
        transformers.MistralConfig(**DECODER, sliding_window=4),
        transformers.MistralForCausalLM,
    ),
    "gemma2-softcap": lambda: (
        transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5),
        transformers.Gemma2ForCausalLM,
    ),
    "gpt2": lambda: (
        transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        transformers.GPT2LMHeadModel,
    ),
}
ENCODERS = {
    "bert": lambda: (transformers.BertConfig(**ENCODER), transformers.BertModel),
    "modernbert-local": lambda: (
        transformers.ModernBertConfig(**{**ENCODER, **MODERN_BERT}, local_attention=4),
        transformers.ModernBertModel,
    ),
    "t5-position-bias": lambda: (transformers.T5Config(**T5), transformers.T5EncoderModel),
}
PADDINGS = {"none": slice(0, 0), "left": slice(0, 4), "right": slice(7, 11)}


@pytest.fixture
def enabled():
    enable()
    yield
    disable()


def made(build, attn_implementation="eager"):
    config, cls = build()
    torch.manual_seed(SEED)
    return cls._from_config(config, attn_implementation=attn_implementation).eval()


def inputs(padding="none"):
    torch.manual_seed(SEED)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, PADDINGS[padding]] = 0
    return {"input_ids": torch.randint(5, 100, (2, 11)), "attention_mask": mask}


def largest_difference(model, given, eager):
    """Between the first output under attn and `eager`, at the tokens that are there."""
    with torch.no_grad():
        return (model(**given)[0] - eager)[given["attention_mask"].bool()].abs().max().item()


# Models


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [*CAUSAL_LMS, *ENCODERS])
def test_a_model_gives_the_same_as_with_eager_attention(name, padding):
    model = made({**CAUSAL_LMS, **ENCODERS}[name])
    given = inputs(padding)
    with torch.no_grad():
        eager = model(**given)[0]
    model.set_attn_implementation("attn")
    with record() as calls:
        assert largest_difference(model, given, eager) < ATOL
    assert sum(calls.kernels.values()) == model.config.num_hidden_layers, calls


@pytest.mark.usefixtures("enabled")
def test_a_vision_model_gives_the_same_as_with_eager_attention():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    model = made(lambda: (config, transformers.ViTModel))
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        eager = model(pixels)[0]
        model.set_attn_implementation("attn")
        torch.testing.assert_close(model(pixels)[0], eager, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("enabled")
def test_an_encoder_decoder_gives_the_same_as_with_eager_attention():
    model = made(lambda: (transformers.T5Config(**T5), transformers.T5Model))
    given = {**inputs("right"), "decoder_input_ids": torch.randint(5, 100, (2, 6))}
    with torch.no_grad():
        eager = model(**given)[0]
        model.set_attn_implementation("attn")
        torch.testing.assert_close(model(**given)[0], eager, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("enabled")
def test_the_implementation_may_be_named_when_the_model_is_made():
    given = inputs("left")
    with torch.no_grad():
        eager = made(CAUSAL_LMS["llama-gqa"])(**given)[0]
    assert largest_difference(made(CAUSAL_LMS["llama-gqa"], "attn"), given, eager) < ATOL


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcap"])
def test_generated_tokens_are_those_of_eager_attention(name, cache):
    model = made(CAUSAL_LMS[name])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    eager = model.generate(**inputs("left"), **options)
    model.set_attn_implementation("attn")
    assert torch.equal(model.generate(**inputs("left"), **options), eager)


@pytest.mark.usefixtures("enabled")
def test_gradients_are_those_of_eager_attention():
    grads = {}
    for implementation in ("eager", "attn"):
        model = made(CAUSAL_LMS["llama-gqa"], implementation)
        given = inputs("left")
        labels = given["input_ids"].clone()
        labels[0, :5] = -100  # padding, and the first token, which padding would have to predict
        model(**given, labels=labels).loss.backward()
        grads[implementation] = [parameter.grad for parameter in model.parameters()]
    for got, expected in zip(grads["attn"], grads["eager"]):
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=1e-4)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("build", [CAUSAL_LMS["llama-gqa"], ENCODERS["bert"]], ids=["llama", "bert"])
def test_a_compiled_model_is_one_graph_for_every_length_and_batch(build):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    graphs, model = CompileCounter(), made(build, "attn")
    model.config.use_cache = False
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    torch.manual_seed(SEED)
    for batch, seqlen in ((2, 9), (2, 12), (3, 12), (5, 17)):
        mask = torch.ones(batch, seqlen, dtype=torch.long)
        mask[0, :3] = 0
        given = {"input_ids": torch.randint(5, 100, (batch, seqlen)), "attention_mask": mask}
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given)[0], model(**given)[0], atol=ATOL, rtol=0)
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("enabled")
def test_packed_sequences_do_not_see_each_other():
    model = made(CAUSAL_LMS["llama-gqa"], "attn")
    torch.manual_seed(SEED)
    first, second = torch.randint(5, 100, (1, 5)), torch.randint(5, 100, (1, 6))
    positions = torch.tensor([[*range(5), *range(6)]])
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, apart, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("enabled")
def test_without_the_mask_registration_padding_would_be_attended():
    model, given = made(CAUSAL_LMS["llama-gqa"]), inputs("left")
    with torch.no_grad():
        eager = model(**given)[0]
    model.set_attn_implementation("attn")
    kept = MASKS._global_mapping.pop("attn")
    try:
        assert largest_difference(model, given, eager) > 100 * ATOL
    finally:
        MASKS._global_mapping["attn"] = kept
    assert largest_difference(model, given, eager) < ATOL


@pytest.mark.usefixtures("enabled")
def test_weights_are_refused_when_a_model_is_asked_for_them():
    model = made(CAUSAL_LMS["llama-gqa"], "attn")
    with pytest.raises(InputError, match=r"^output_attentions: .*eager"):
        model(**inputs(), output_attentions=True)


@pytest.mark.usefixtures("enabled")
def test_a_model_with_attention_sinks_is_refused_by_their_name():
    config = transformers.GptOssConfig(**DECODER, head_dim=8, num_local_experts=4)
    model = made(lambda: (config, transformers.GptOssForCausalLM), "attn")
    with pytest.raises(InputError, match=r"^s_aux: attn has no attention sinks"):
        model(**inputs())


# The attention function, beside the host's own

SHAPES = {"square": (5, 5), "one query": (1, 5), "cache not full": (3, 7), "cross": (4, 9)}
MODULES = {
    "module says nothing": SimpleNamespace(),
    "module is causal": SimpleNamespace(is_causal=True),
    "module is not causal": SimpleNamespace(is_causal=False),
}


def operands(seqlen_q, seqlen_kv, num_kv_heads=2, batch=2):
    torch.manual_seed(SEED)
    query = torch.randn(batch, 4, seqlen_q, 8)
    key, value = (torch.randn(2, num_kv_heads, seqlen_kv, 8) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("position_bias", [False, True], ids=["plain", "position bias"])
@pytest.mark.parametrize("mask", ["no mask", "bool", "float"])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_function_agrees_with_the_sdpa_of_transformers(shape, module, is_causal, mask, position_bias):
    seqlen_q, seqlen_kv = SHAPES[shape]
    query, key, value = operands(seqlen_q, seqlen_kv)
    keep = torch.rand(2, 1, seqlen_q, seqlen_kv) < 0.7
    keep[..., 0] = True  # a query without any key is stock's affair
    masks = {"no mask": None, "bool": keep, "float": torch.randn(2, 1, seqlen_q, seqlen_kv)}
    given = {"is_causal": is_causal, "scaling": 0.3}
    if position_bias:
        given["position_bias"] = torch.randn(1, 4, seqlen_q, seqlen_kv)
    at = SimpleNamespace(**vars(MODULES[module]), num_key_value_groups=2)
    expected, _ = sdpa_attention_forward(at, query, key, value, masks[mask], **given)
    out, weights = attention_forward(at, query, key, value, masks[mask], **given)
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)
    assert weights is None
    assert out.shape == (2, seqlen_q, 4, 8)
    assert out.is_contiguous()


def test_learned_queries_of_one_batch_entry_serve_the_whole_batch():
    query, key, value = operands(3, 5, num_kv_heads=4, batch=1)
    module = SimpleNamespace(is_causal=False)
    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    torch.testing.assert_close(attention_forward(module, query, key, value, None)[0], expected, atol=ATOL, rtol=0)


def test_the_position_bias_gets_its_gradient():
    query, key, value = operands(5, 5, num_kv_heads=4)
    grads = []
    for function in (sdpa_attention_forward, attention_forward):
        position_bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(SEED)).requires_grad_()
        function(SimpleNamespace(), query, key, value, None, position_bias=position_bias)[0].sum().backward()
        grads.append(position_bias.grad)
    torch.testing.assert_close(*grads, atol=ATOL, rtol=0)


def test_softcap_is_honoured():
    query, key, value = operands(5, 5)
    out, _ = attention_forward(SimpleNamespace(is_causal=False), query, key, value, None, softcap=0.7)
    expected, _ = reference_attention(*(x.transpose(1, 2) for x in (query, key, value)), softcap=0.7)
    torch.testing.assert_close(out.double(), expected, atol=ATOL, rtol=0)


def test_dropout_is_honoured():
    query, key, value = operands(5, 5)
    torch.manual_seed(SEED)
    dropped, _ = attention_forward(SimpleNamespace(), query, key, value, None, dropout=0.5)
    kept, _ = attention_forward(SimpleNamespace(), query, key, value, None)
    assert not torch.allclose(dropped, kept)


# Arguments: none vanishes

REFUSED = {
    "output_attentions": True,
    "s_aux": torch.zeros(4),
    "sinks": torch.zeros(4),
    "indices": torch.zeros(2, 5, 3, dtype=torch.long),
    "block_indices": torch.zeros(2, 5, 3, dtype=torch.long),
    "cache": object(),
    "deterministic": True,
    "cu_seq_lens_q": torch.tensor([0, 2, 5]),
    "cu_seq_lens_k": torch.tensor([0, 2, 5]),
    "seq_idx": torch.zeros(1, 5, dtype=torch.int32),
    "sliding_window": 3,
    "a_new_idea": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_cannot_be_honoured_is_an_error_that_names_it(name):
    with pytest.raises(InputError, match=rf"^{name}: \w"):
        attention_forward(SimpleNamespace(), *operands(5, 5), None, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_argument_as_none_is_no_error(name):
    attention_forward(SimpleNamespace(), *operands(5, 5), None, **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", torch.arange(5)),
        ("use_cache", True),
        ("return_dict", True),
        ("logits_to_keep", 0),
        ("num_items_in_batch", torch.tensor(3)),
        ("output_attentions", False),
        ("cu_seq_lens_q", torch.tensor([0, 5])),
        ("max_length_q", 5),
        ("sliding_window", 5),
    ],
)
def test_bookkeeping_changes_nothing(name, value):
    given = operands(5, 5)
    plain, _ = attention_forward(SimpleNamespace(), *given, None)
    assert torch.equal(attention_forward(SimpleNamespace(), *given, None, **{name: value})[0], plain)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx", "sliding_window"])
def test_what_the_mask_carries_is_left_to_the_mask(name):
    mask = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
    given = operands(5, 5)
    plain, _ = attention_forward(SimpleNamespace(), *given, mask)
    assert torch.equal(attention_forward(SimpleNamespace(), *given, mask, **{name: REFUSED[name]})[0], plain)


def test_an_unknown_argument_passes_once_it_is_said_to_be_harmless():
    enable(ignore={"a_new_idea"})
    try:
        ATTENTIONS["attn"](SimpleNamespace(), *operands(5, 5), None, a_new_idea=1)
        with pytest.raises(InputError, match="another_one"):
            ATTENTIONS["attn"](SimpleNamespace(), *operands(5, 5), None, another_one=1)
    finally:
        disable()


# Registration


def registries():
    """What is registered, and in which order."""
    return list(ATTENTIONS.items()), list(MASKS.items())


def test_disable_leaves_the_registries_as_they_were():
    before = registries()
    enable()
    enable(prefer="torch/math")
    enable("another")
    assert integration.is_enabled()
    assert ATTENTIONS["sdpa"] is not sdpa_attention_forward
    disable()
    assert registries() == before
    assert not integration.is_enabled()


def test_a_name_of_its_own_leaves_sdpa_alone():
    enable("fast")
    try:
        assert ATTENTIONS["sdpa"] is sdpa_attention_forward
        assert (integration.is_enabled(), integration.is_enabled("fast"), integration.is_enabled("sdpa")) == (
            True,
            True,
            False,
        )
    finally:
        disable("fast")
    assert not integration.is_enabled()


def test_disable_without_enable_changes_nothing():
    before = dict(ATTENTIONS), dict(MASKS)
    disable()
    disable("sdpa")
    assert (dict(ATTENTIONS), dict(MASKS)) == before


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_a_name_of_the_host_is_not_taken_over(name):
    before = dict(ATTENTIONS), dict(MASKS)
    with pytest.raises(InputError, match=f"{name!r} already"):
        enable(name)
    assert (dict(ATTENTIONS), dict(MASKS)) == before


@pytest.mark.parametrize("name", ["attn-flash", "attn/fast", "paged|attn"])
def test_a_name_that_the_host_would_take_for_something_else_is_refused(name):
    with pytest.raises(InputError, match="for a kernel of its own; choose another"):
        enable(name)
    assert not integration.is_enabled()


def test_an_attention_that_somebody_else_registered_is_not_taken_over():
    ATTENTIONS.register("attn", sdpa_attention_forward)
    try:
        with pytest.raises(InputError, match="'attn' already"):
            enable()
        disable()
        assert ATTENTIONS["attn"] is sdpa_attention_forward
    finally:
        del ATTENTIONS._global_mapping["attn"]


def test_another_name_will_do():
    enable("fast")
    try:
        given = inputs("left")
        with torch.no_grad():
            eager = made(CAUSAL_LMS["llama-gqa"])(**given)[0]
        assert largest_difference(made(CAUSAL_LMS["llama-gqa"], "fast"), given, eager) < ATOL
    finally:
        disable("fast")


# In place of "sdpa"


def test_one_line_switches_a_model_that_is_there_and_one_that_comes_and_stock_comes_back_bit_for_bit():
    model, given = made(CAUSAL_LMS["mistral-window"], "sdpa"), inputs("left")
    with torch.no_grad():
        stock = model(**given)[0]
        enable(prefer="torch/math")
        try:
            for each in (model, made(CAUSAL_LMS["mistral-window"], "sdpa")):
                with record() as calls:
                    assert largest_difference(each, given, stock) < ATOL
                assert calls.kernels == {"torch/math": 2}
        finally:
            disable()
        with record() as calls:
            assert torch.equal(model(**given)[0], stock)
    assert not calls.kernels


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", ["output_attentions", "cache", "a_new_idea"])
def test_what_attn_cannot_honour_goes_to_the_hosts_own_function_and_record_has_the_reason(name):
    given, module = operands(5, 5, num_kv_heads=4), SimpleNamespace()
    expected, _ = sdpa_attention_forward(module, *given, None, **{name: REFUSED[name]})
    with record() as calls:
        out, _ = ATTENTIONS["sdpa"](module, *given, None, **{name: REFUSED[name]})
    assert torch.equal(out, expected)
    (row,) = calls
    assert row.kernel == "torch (stock)"
    assert row.reason.startswith(f"{name}: ")


@pytest.mark.usefixtures("enabled")
def test_an_exported_model_does_not_need_attn():
    model = made(ENCODERS["bert"], "sdpa")
    exported = torch.export.export(model, (), {"input_ids": inputs()["input_ids"]}, strict=False)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any("scaled_dot_product_attention" in target for target in targets)
    assert not any("attn_core" in target or target.startswith("attn.") for target in targets)


def test_a_kernel_that_is_preferred_runs_where_it_can_and_strict_refuses_where_it_cannot():
    enable(prefer="torch/math")
    model, given = made(CAUSAL_LMS["llama-gqa"], "sdpa"), inputs("left")
    try:
        with record() as calls:
            model(**given)
        assert calls.kernels == {"torch/math": 2}
        enable(prefer="torch/cudnn", strict=True)
        with pytest.raises(KernelRefusedError, match="torch/cudnn"):
            model(**given)
        with pytest.raises(KernelRefusedError, match="output_attentions"):
            ATTENTIONS["sdpa"](SimpleNamespace(), *operands(5, 5), None, output_attentions=True)
    finally:
        disable()


def test_what_cannot_be_preferred_is_an_error_and_changes_nothing():
    before = registries()
    with pytest.raises(UnknownKernelError, match="torch/mat"):
        enable(prefer="torch/mat")
    with pytest.raises(InputError, match="strict"):
        enable(strict=True)
    assert registries() == before


def test_two_models_have_each_its_own_kernel():
    enable("attn-math", prefer="torch/math")
    enable("attn-reference", prefer=("torch/reference",), strict=True)
    given = inputs("left")
    try:
        models = {kernel: made(CAUSAL_LMS["llama-gqa"], f"attn-{kernel}") for kernel in ("math", "reference")}
        with torch.no_grad():
            for kernel, model in models.items():
                with record() as calls, prefer("torch/flash"):  # what the name says comes before
                    model(**given)
                assert calls.kernels == {f"torch/{kernel}": 2}
    finally:
        disable()


def test_a_compiled_model_runs_by_the_kernel_of_its_name():
    torch._dynamo.reset()
    enable(prefer="torch/math")
    try:
        model, given = made(ENCODERS["bert"], "sdpa"), inputs("right")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad(), record() as calls:
            out = compiled(**given)[0]
        assert set(calls.kernels) == {"torch/math"}
    finally:
        disable()
    with torch.no_grad():
        torch.testing.assert_close(
            out[given["attention_mask"].bool()], model(**given)[0][given["attention_mask"].bool()]
        )


def test_somebody_elses_function_in_place_of_attns_stays_and_is_warned_of():
    before = registries()
    enable()
    ours = ATTENTIONS["sdpa"]
    ATTENTIONS.register("sdpa", lambda *args, **kwargs: ours(*args, **kwargs))
    theirs = ATTENTIONS["sdpa"]
    try:
        with pytest.warns(IntegrationWarning, match="another function under transformers' 'sdpa'"):
            disable()
        assert ATTENTIONS["sdpa"] is theirs
        with record() as calls:
            made(CAUSAL_LMS["llama-gqa"], "sdpa")(**inputs())  # what is left of ours leads to the host's
        assert not calls.kernels
    finally:
        ATTENTIONS.register("sdpa", sdpa_attention_forward)
    assert registries() == before


# The report


def test_the_report_tells_of_every_module_with_attention_who_computes_it_and_why():
    llama = made(CAUSAL_LMS["llama-gqa"], "sdpa")
    layers = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [(row.module, row.redirected, row.reason) for row in integration.report(llama)] == [
        (layer, False, "set to 'sdpa'; attn is not enabled") for layer in layers
    ]
    enable()
    try:
        assert [row.module for row in integration.report(llama).redirected] == layers
        eager = integration.report(made(CAUSAL_LMS["gemma2-softcap"]))
        assert [row.reason for row in eager] == ["set to 'eager'; set_attn_implementation(\"attn\") changes that"] * 2
    finally:
        disable()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: (transformers.GptOssConfig(**DECODER, head_dim=8, num_local_experts=4), transformers.GptOssModel),
            "has attention sinks",
        ),
        (
            lambda: (
                transformers.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
                transformers.FalconModel,
            ),
            "calls torch's attention itself, past transformers' registry",
        ),
        (
            lambda: (
                transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4),
                transformers.BloomModel,
            ),
            "takes the softmax itself",
        ),
    ],
    ids=["sinks", "torch's attention", "softmax"],
)
def test_the_report_says_why_a_module_is_left_alone(build, reason):
    found = integration.report(made(build, None))
    assert len(found) == len(found.left_alone) > 0
    assert all(reason in row.reason for row in found), str(found)
    assert reason in str(found)


def test_a_model_that_is_still_set_to_attn_raises_after_disable():
    enable()
    model = made(CAUSAL_LMS["llama-gqa"], "attn")
    disable()
    with pytest.raises(KeyError, match="attn"):
        model(**inputs())


def test_without_transformers_the_error_is_the_line_to_type():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from attn_core.integrations import transformers as t\n"
        "try: t.enable()\n"
        "except ImportError as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingPackageError")
    assert f"transformers is not installed.\nTo install it: {integration.FIX}" in done.stdout


def test_importing_the_core_loads_no_integration():
    script = (
        "import sys, attn_core\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'transformers' or 'integrations' in m))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
