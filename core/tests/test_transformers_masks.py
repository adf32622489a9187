"""Structured masks of the transformers host mean what its dense ones say, and are that to whoever looks inside."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attn-core[demo]'"
)

from attn_core import Causal, Segments, TensorBias, Window, record  # noqa: E402
from attn_core.bias import Intersection  # noqa: E402
from attn_core.integrations import transformers as integration  # noqa: E402
from attn_core.integrations.transformers import attention_forward, masks  # noqa: E402
from attn_core.integrations.transformers.masks import LazyMask, structured_mask  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers import masking_utils as host  # noqa: E402

SEED = 20261121
ATOL = 1e-5
BATCH = 2

#: rule -> (the host's function, the host's local_size, whether it is causal)
RULES = {
    "causal": (host.causal_mask_function, None, True),
    "window of 3": (host.sliding_window_causal_mask_function(3), 3, True),
    "window of 1": (host.sliding_window_causal_mask_function(1), 1, True),
    "wide window": (host.sliding_window_causal_mask_function(99), 99, True),
    "bidirectional": (host.bidirectional_mask_function, None, False),
    "bidirectional window": (host.sliding_window_bidirectional_mask_function(2), 2, False),
    "chunks": (host.chunked_causal_mask_function(3, torch.tensor([0, 2])), 3, True),
    "causal or a prefix": (host.or_masks(host.causal_mask_function, lambda b, h, q, k: k < 2), None, True),
}
#: name -> (q_length, kv_length, q_offset, kv_offset)
SIZES = {
    "square": (6, 6, 0, 0),
    "cache": (3, 6, 3, 0),
    "empty static cache": (3, 8, 0, 0),
    "half-full static cache": (3, 8, torch.tensor(2), 0),
    "sliding cache": (3, 5, 4, 2),
    "full sliding cache": (4, 6, 6, 4),
    "one query": (1, 6, 5, 0),
    "fewer keys": (5, 4, 0, 0),
}
PADDINGS = {
    "no padding": lambda k: None,
    "all there": lambda k: torch.ones(BATCH, len(k), dtype=torch.bool),
    "right": lambda k: k < torch.tensor([[99], [len(k) - 2]]),
    "left": lambda k: k >= torch.tensor([[0], [2]]),
    "holes": lambda k: (k % 3 != 1).expand(BATCH, len(k)),
    "one entry nowhere": lambda k: (k < 99) & torch.tensor([[False], [True]]),
    "shorter than the keys": lambda k: torch.ones(BATCH, len(k) - 1, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(masks, "LEAST_KEYS", 2)


def asked(rule="causal", size="square", padding="no padding", **others):
    """The arguments with which the host asks for a mask."""
    q_length, kv_length, q_offset, kv_offset = SIZES[size]
    function, local_size, _ = RULES[rule]
    given = {"batch_size": BATCH, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset, "mask_function": function, "local_size": local_size}
    given |= {"attention_mask": PADDINGS[padding](torch.arange(kv_length + kv_offset))}
    return given | {"allow_is_causal_skip": False} | others


def made(*args, **others):
    return structured_mask(host.sdpa_mask, **asked(*args, **others))


def dense(*args, **others):
    return host.sdpa_mask(**asked(*args, **others))


def written_out(mask):
    """What a LazyMask means, as a tensor."""
    if mask.bias() is None:
        return torch.ones(mask.shape, dtype=torch.bool)
    given = TensorBias(mask.bias()) if isinstance(mask.bias(), torch.Tensor) else mask.bias()
    return given.bind(*mask.shape[2:]).materialize().expand(mask.shape)


# What it means


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_it_means_what_the_hosts_mask_says(rule, size, padding):
    mask, expected = made(rule, size, padding), dense(rule, size, padding)
    assert mask.shape == expected.shape
    assert (mask.dtype, mask.device) == (expected.dtype, expected.device)
    if isinstance(mask, LazyMask):
        assert torch.equal(written_out(mask), expected)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [name for name in SIZES if name != "one query"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "causal or a prefix"])  # which the host never skips
def test_none_stands_for_causal_or_for_nothing_masked_and_only_where_the_host_lets_it(rule, size, padding):
    _, _, causal = RULES[rule]
    skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
    mask, expected = made(rule, size, padding, **skips), dense(rule, size, padding)
    if mask is None:
        q_length, kv_length = expected.shape[2:]
        meant = torch.ones(q_length, kv_length, dtype=torch.bool)
        assert torch.equal(expected, (meant.tril() if causal else meant).expand(expected.shape))
    else:
        assert torch.equal(mask, expected)


def test_the_kinds_are_those_by_which_kernels_skip():
    assert made("causal").bias() == Causal("top-left").bind(6, 6)
    assert made("causal", "cache").bias() == Causal("bottom-right").bind(3, 6)
    assert made("window of 3").bias() == Window(2, 0, "top-left").bind(6, 6)
    assert made("bidirectional window").bias() == Window(2, 2, "top-left").bind(6, 6)
    assert made("bidirectional").bias() is None
    assert isinstance(made("causal", padding="left").bias(), Intersection)
    assert made("bidirectional", padding="right").bias().tensor.shape == (BATCH, 1, 1, 6)


@pytest.mark.parametrize("rule", ["chunks", "causal or a prefix"])
def test_what_is_not_known_here_is_the_hosts_own_tensor(rule):
    assert type(made(rule)) is torch.Tensor


def test_a_rule_of_somebody_elses_is_the_hosts_own_tensor():
    def causal_mask_function(b, h, q, k):  # not what its name says
        return k >= q

    mask = made(mask_function=causal_mask_function)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, torch.ones(6, 6, dtype=torch.bool).triu().expand(mask.shape))


@pytest.mark.parametrize("rule", ["causal", "window of 3"])
def test_packed_sequences_are_segments(rule):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]).expand(BATCH, -1)
    documents = host.find_packed_sequence_indices(positions)
    function = host.packed_sequence_compatibility_function(RULES[rule][0], positions, documents)
    mask = made(mask_function=function, q_length=8, kv_length=8)
    within = Causal() if rule == "causal" else Window(2, 0)
    assert mask.bias() == Segments([3, 4, 1], within=within).bind(8, 8).normalize()
    assert torch.equal(written_out(mask), dense(mask_function=function, q_length=8, kv_length=8))


def test_batch_entries_that_are_packed_differently_are_the_hosts_own_tensor():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    function = host.packed_sequence_compatibility_function(
        host.causal_mask_function, positions, host.find_packed_sequence_indices(positions)
    )
    assert type(made(mask_function=function)) is torch.Tensor


@pytest.mark.parametrize("kv_length", [511, 512])
def test_a_small_mask_is_the_hosts_own_tensor(monkeypatch, kv_length):
    monkeypatch.undo()
    mask = made("window of 3", q_length=kv_length, kv_length=kv_length)
    assert type(mask) is (LazyMask if kv_length == 512 else torch.Tensor)


def test_where_tensors_have_no_values_it_is_the_hosts_own():
    assert (
        type(made(attention_mask=torch.ones(BATCH, 6, dtype=torch.bool, device="meta"), device="meta")) is torch.Tensor
    )
    with torch._subclasses.FakeTensorMode():
        assert not isinstance(made(), LazyMask)


# Whoever looks inside finds the host's tensor

OPERATIONS = {
    "slice": lambda m: m[:, :, 1:],
    "cast": lambda m: m.to(torch.float32),
    "not": lambda m: ~m,
    "where": lambda m: torch.where(m, 0.0, -1.0),
    "expand": lambda m: m.expand(BATCH, 4, 6, 6),
    "contiguous and view": lambda m: m.contiguous().view(-1, 6),
    "clone": lambda m: m.clone(),
    "cat": lambda m: torch.cat([m, m], -1),
    "view": lambda m: m.view(BATCH, 6, 6),
    "and": lambda m: m & m,
    "added": lambda m: torch.ones(6, 6) + m,
    "detach": lambda m: m.detach(),
    "list": lambda m: torch.tensor(m.tolist()),
    "numpy": lambda m: torch.from_numpy(m.numpy()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "compare": lambda m: m == m,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_that_of_the_dense_tensor(operation):
    apply = OPERATIONS[operation]
    got, expected = apply(made("window of 3", padding="left")), apply(dense("window of 3", padding="left"))
    assert torch.equal(got, expected)
    assert type(got) is torch.Tensor


def test_what_somebody_writes_into_it_counts():
    mask, expected = made("window of 3", padding="left"), dense("window of 3", padding="left")
    for tensor in (mask, expected):
        tensor[:, :, :, 0] = True
        part = tensor[:, :, 1]  # a view, written to later
        part |= True
    assert torch.equal(mask.bias(), expected)
    torch.manual_seed(SEED)
    query = torch.randn(BATCH, 4, 6, 8)
    module = torch.nn.Identity()
    out, _ = attention_forward(module, query, query, query, mask)
    stock = scaled_dot_product_attention(query, query, query, expected)
    torch.testing.assert_close(out, stock.transpose(1, 2), atol=ATOL, rtol=0)


def test_torchs_attention_takes_it_with_gradients():
    torch.manual_seed(SEED)
    query = torch.randn(BATCH, 4, 6, 8, requires_grad=True)
    grads = []
    for mask in (made("window of 3", padding="right"), dense("window of 3", padding="right")):
        out = scaled_dot_product_attention(query, query, query, mask)
        grads.append(torch.autograd.grad(out.sum(), query)[0])
    torch.testing.assert_close(*grads, atol=ATOL, rtol=0)


def test_it_is_not_written_out_where_only_attn_uses_it():
    mask = made("window of 3")
    torch.manual_seed(SEED)
    query = torch.randn(BATCH, 4, 6, 8)
    assert mask.shape == (BATCH, 1, 6, 6)
    out, _ = attention_forward(torch.nn.Identity(), query, query, query, mask)
    assert mask._dense is None
    expected = scaled_dot_product_attention(query, query, query, dense("window of 3"))
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=ATOL, rtol=0)


def test_for_other_operands_than_it_was_made_for_it_is_the_dense_tensor():
    torch.manual_seed(SEED)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(BATCH, 4, 6, 8)
    mask = made("causal", padding="left")
    out, _ = attention_forward(torch.nn.Identity(), query, key, key, mask)
    expected = scaled_dot_product_attention(query, key, key, dense("causal", padding="left"))
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=ATOL, rtol=0)


def test_a_position_bias_is_added_to_what_it_says():
    torch.manual_seed(SEED)
    query, position_bias = torch.randn(BATCH, 4, 6, 8), torch.randn(1, 4, 6, 6)
    for rule in ("causal", "bidirectional"):
        mask, bools = made(rule), dense(rule)
        out, _ = attention_forward(torch.nn.Identity(), query, query, query, mask, position_bias=position_bias)
        added = torch.where(bools, position_bias, -torch.inf)
        expected = scaled_dot_product_attention(query, query, query, added)
        torch.testing.assert_close(out, expected.transpose(1, 2), atol=ATOL, rtol=0)


class Layer(torch.nn.Module):
    def forward(self, query, mask):
        return attention_forward(self, query, query, query, mask)[0]


def test_a_layer_that_is_compiled_alone_follows_each_mask():
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.manual_seed(SEED)
    query = torch.randn(BATCH, 4, 6, 8)
    touched = made("window of 3", padding="left")
    touched[:, :, :, 0] = True
    given = [made("causal"), made("window of 3"), made("window of 1"), made("window of 3", padding="left")]
    for mask in [*given, made("window of 3", padding="right"), made("bidirectional"), touched]:
        torch.testing.assert_close(compiled(query, mask), layer(query, mask), atol=ATOL, rtol=0)


# In a model

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "pad_token_id": 0,
}


def mistral():
    torch.manual_seed(SEED)
    return transformers.MistralForCausalLM._from_config(
        transformers.MistralConfig(**CONFIG), attn_implementation="sdpa"
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_a_training_step_by_structured_masks_has_stock_gradients(checkpointing):
    model = mistral()
    tokens = torch.randint(5, 100, (BATCH, 12))
    there = torch.arange(12) < torch.tensor([[12], [7]])

    def gradients():
        model.zero_grad()
        model(tokens, attention_mask=there.long(), labels=tokens.where(there, -100)).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    if checkpointing:
        model.activation_checkpointing_enable()
    integration.enable(prefer="torch/tiled")
    try:
        with record() as calls:
            got = gradients()
    finally:
        integration.disable()
    assert set(calls.kernels) == {"torch/tiled"}  # which takes no dense mask
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=1e-4)


def test_a_version_that_is_not_tested_gets_dense_masks(monkeypatch):
    monkeypatch.setattr(integration, "TESTED", "<5")
    integration._is_tested.cache_clear()
    integration.enable()
    try:
        config = transformers.MistralConfig(**CONFIG)
        config._attn_implementation = "attn"
        got = host.ALL_MASK_ATTENTION_FUNCTIONS["attn"](**asked("window of 3"), config=config)
        assert type(got) is torch.Tensor
        assert torch.equal(got, host.sdpa_mask(**asked("window of 3")))
    finally:
        integration.disable()
        integration._is_tested.cache_clear()


def test_a_model_that_is_not_attns_gets_the_hosts_masks():
    integration.enable()
    try:
        config = transformers.MistralConfig(**CONFIG)
        function = host.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        for implementation, kind in (("sdpa", LazyMask), ("a kernel of the hub", torch.Tensor)):
            config._attn_implementation = implementation
            assert type(function(**asked("window of 3"), config=config)) is kind
    finally:
        integration.disable()
