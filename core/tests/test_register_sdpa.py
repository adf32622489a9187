"""@register_sdpa: a function with torch's SDPA signature becomes a kernel, or is refused for a reason."""

import pytest
import torch
from attn_core import (
    Capabilities,
    Causal,
    Cost,
    DeclarationError,
    DuplicateKernelError,
    Registration,
    TensorBias,
    Window,
    attention,
    explain,
    kernels,
    prefer,
    record,
    reference_attention,
    register_sdpa,
)
from torch.nn.functional import scaled_dot_product_attention as stock

CPU = {"devices": {"cpu"}, "dtypes": {torch.float32}}


def fast(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 6, 4, 16, generator=generator),
        torch.randn(2, 6, 2, 16, generator=generator),
        torch.randn(2, 6, 2, 16, generator=generator),
    )


def test_a_function_is_ranked_explained_chosen_and_checked_like_any_other(operands):
    query, key, value = operands
    decorate = register_sdpa("mine/fast", **CPU, biases={TensorBias, Causal("top-left")}, gqa=True, backward=True)
    handle = decorate(fast)
    assert isinstance(handle, Registration)
    with handle:
        assert explain(query, key, value)["mine/fast"].state in ("ready", "chosen")
        assert explain(query, key, value, Window(2, 0))["mine/fast"].adaptations == ("materialize",)
        refused = explain(query.double(), key.double(), value.double(), softcap=3.0)["mine/fast"]
        assert refused.refused_fields == ("dtype", "softcap")
        with prefer("mine/fast"), record() as calls:
            for bias in (None, Causal(), torch.randn(6, 6), torch.rand(6, 6) > 0.3, Window(2, 0)):
                expected = reference_attention(query, key, value, bias)[0].float()
                torch.testing.assert_close(attention(query, key, value, bias), expected)
        assert calls.kernels == {"mine/fast": 5}
    assert not kernels("mine/*")


def test_it_serves_as_a_decorator(operands):
    query, key, value = operands

    @register_sdpa("mine/plain", **CPU, head_dims={16}, costs={"cpu": Cost(call=0.0)}, gqa=True)
    def plain(query, key, value, *, scale=None, enable_gqa=False):
        return stock(query, key, value, scale=scale, enable_gqa=enable_gqa)

    with plain:
        assert explain(query, key, value).chosen == "mine/plain"
        torch.testing.assert_close(attention(query, key, value), reference_attention(query, key, value)[0].float())


def test_an_option_is_passed_only_where_the_problem_uses_it(operands):
    query, key, value = operands
    seen = []

    def look(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        seen.append((attn_mask is not None, dropout_p, is_causal, scale, enable_gqa, tuple(query.shape)))
        return query

    everything = {"biases": {TensorBias, Causal("top-left")}, "gqa": True, "dropout": True}
    with register_sdpa("mine/look", **CPU, **everything)(look), prefer("mine/look"):
        attention(query, key, value)
        attention(query, key, value, Causal(), scale=0.5)
        attention(query, key, value, torch.zeros(6, 6))
        attention(query, query, query, dropout_p=0.25)
    heads_first = (2, 4, 6, 16)
    assert seen == [
        (False, 0.0, False, 0.25, True, heads_first),
        (False, 0.0, True, 0.5, True, heads_first),
        (True, 0.0, False, 0.25, True, heads_first),
        (False, 0.25, False, 0.25, False, heads_first),
    ]


def test_kv_heads_are_expanded_for_a_function_without_gqa(operands):
    query, key, value = operands

    def plain(query, key, value, *, scale=None):
        assert query.shape == key.shape
        return stock(query, key, value, scale=scale)

    with register_sdpa("mine/plain", **CPU)(plain):
        assert explain(query, key, value)["mine/plain"].adaptations == ("expand_kv",)
        out = attention(query, key, value, kernel="mine/plain")
    torch.testing.assert_close(out, reference_attention(query, key, value)[0].float())


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(DuplicateKernelError):
        register_sdpa("torch/math", **CPU)(fast)


def takes_any_keyword(query, key, value, **options):
    return query


def takes_any_position(query, key, value, *rest, scale=None):
    return query


def without_scale(query, key, value):
    return query


def with_scale_alone(query, key, value, *, scale=None):
    return query


def with_a_mask_that_has_no_default(query, key, value, attn_mask, *, scale=None):
    return query


def with_an_option_of_its_own(query, key, value, *, scale, block_size):
    return query


DECLARATIONS = {
    "softcap": ({"softcap": True}, fast, "mine/x: SDPA's signature has no softcap; register a Kernel instead"),
    "return_lse": ({"return_lse": True}, fast, "SDPA's signature has no return_lse"),
    "both corners": ({"biases": {Causal}}, fast, r'has words for TensorBias and Causal\("top-left"\), got'),
    "bottom-right": ({"biases": {Causal("bottom-right")}}, fast, r'got Causal\("bottom-right"\)'),
    "window": ({"biases": {Window}}, fast, "got <class 'attn_core.bias.window.Window'>"),
    "unknown capability": ({"gaq": True}, fast, "Capabilities has no 'gaq'"),
    "devices is a string": ({"devices": "cpu"}, fast, "devices must be a set"),
    "catch-all": ({}, takes_any_keyword, "catch-all"),
    "positional catch-all": ({}, takes_any_position, "catch-all"),
    "a built-in": ({}, stock, "wrap it in a Python function"),
    "no scale": ({}, without_scale, "needs the parameter scale, which it lacks"),
    "no attn_mask": ({"biases": {TensorBias}}, with_scale_alone, "needs the parameter attn_mask"),
    "no is_causal": ({"biases": {Causal("top-left")}}, with_scale_alone, "needs the parameter is_causal"),
    "no dropout_p": ({"dropout": True}, with_scale_alone, "needs the parameter dropout_p"),
    "no enable_gqa": ({"gqa": True}, with_scale_alone, "needs the parameter enable_gqa"),
    "two are missing": ({"gqa": True, "dropout": True}, with_scale_alone, "needs the parameter dropout_p, enable_gqa"),
    "no default": ({}, with_a_mask_that_has_no_default, "must have defaults; without a default: attn_mask"),
    "own option": ({}, with_an_option_of_its_own, "must have defaults; without a default: block_size"),
    "two operands": ({}, lambda query, key, scale: query, "after query, key and value"),
}


@pytest.mark.parametrize(("given", "function", "message"), DECLARATIONS.values(), ids=DECLARATIONS)
def test_what_sdpa_s_signature_cannot_say_is_refused(given, function, message):
    with pytest.raises(DeclarationError, match=message):
        register_sdpa("mine/x", **{**CPU, **given})(function)
    assert not kernels("mine/*")


@pytest.mark.parametrize("name", ["fast", "mine/fast now", "mine/*"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(DeclarationError, match="name must be '<plugin>/<kernel>'"):
        register_sdpa(name, **CPU)(fast)


def test_what_is_not_named_is_not_supported():
    with register_sdpa("mine/fast", **CPU)(fast) as handle:
        [declared] = handle.kernel.declarations
    plain = Capabilities(**CPU, head_dims=declared.head_dims)
    assert declared == plain
