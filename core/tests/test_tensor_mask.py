"""A plain tensor as attn_mask is deprecated: said once per place, switched by ATTN_TENSOR_MASK, and never by attn."""

from __future__ import annotations

import warnings

import attn_core
import pytest
import torch
import torch.nn.functional as F
from attn_core import InputError, InputTypeError, TensorBias, attention, scaled_dot_product_attention
from attn_core.tensor_mask import PLACES, _kept, seen

QUERY = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(20261121))
MASK = torch.ones(4, 4, dtype=torch.bool).tril()


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.delenv("ATTN_TENSOR_MASK", raising=False)
    attn_core.refresh()
    yield
    monkeypatch.undo()
    attn_core.refresh()


@pytest.fixture
def heard():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield heard


def set_to(monkeypatch, word):
    monkeypatch.setenv("ATTN_TENSOR_MASK", word)
    attn_core.refresh()


def test_each_place_is_told_once_and_the_warning_points_at_it(heard):
    for _ in range(3):
        scaled_dot_product_attention(*QUERY, MASK)
        scaled_dot_product_attention(*QUERY, attn_mask=MASK)
    scaled_dot_product_attention(*QUERY, MASK)
    assert [warning.category for warning in heard] == [DeprecationWarning] * 3
    assert {warning.filename for warning in heard} == {__file__}
    first = heard[0].lineno
    assert [warning.lineno - first for warning in heard] == [0, 1, 2]
    assert "pass attn_core.TensorBias(tensor)" in str(heard[0].message)


def test_two_calls_in_one_line_are_two_places(heard):
    _ = scaled_dot_product_attention(*QUERY, MASK), scaled_dot_product_attention(*QUERY, MASK)
    assert len(heard) == 2


def test_a_parameter_is_a_tensor_too(heard):
    scaled_dot_product_attention(*QUERY, torch.nn.Parameter(torch.zeros(4, 4)))
    assert len(heard) == 1


def test_where_filters_make_it_an_error_it_is_one_each_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(DeprecationWarning, match="plain tensor is deprecated"):
                scaled_dot_product_attention(*QUERY, MASK)


def test_silent_is_silent(monkeypatch, heard):
    set_to(monkeypatch, "silent")
    scaled_dot_product_attention(*QUERY, MASK)
    assert heard == []


def test_error_is_an_error_at_every_call_that_names_what_to_write(monkeypatch, heard):
    set_to(monkeypatch, "error")
    for _ in range(2):
        with pytest.raises(InputTypeError, match=r"pass attn_core\.TensorBias\(tensor\)"):
            scaled_dot_product_attention(*QUERY, MASK)
    scaled_dot_product_attention(*QUERY, TensorBias(MASK))
    assert heard == []


def test_error_counts_for_places_that_were_told_before(monkeypatch, heard):
    for word in ("warn", "error"):
        set_to(monkeypatch, word)
        if word == "warn":
            call = scaled_dot_product_attention
            call(*QUERY, MASK)
    with pytest.raises(InputTypeError):
        call(*QUERY, MASK)


def test_a_bad_word_fails_the_first_call_and_says_what_is_taken(monkeypatch):
    monkeypatch.setenv("ATTN_TENSOR_MASK", "loud")
    with pytest.raises(InputError, match="ATTN_TENSOR_MASK: takes silent, warn, error; got 'loud'"):
        attn_core.refresh()
    with pytest.raises(InputError, match="ATTN_TENSOR_MASK: takes"):
        attention(*QUERY)


def test_everything_else_is_not_told(heard):
    scaled_dot_product_attention(*QUERY)
    scaled_dot_product_attention(*QUERY, TensorBias(MASK))
    scaled_dot_product_attention(*QUERY, attn_core.Causal())
    attention(*QUERY.transpose(2, 3), MASK)
    bias = TensorBias(MASK)
    attn_core.Causal().dispatch(*QUERY, bias, False, None, 0.0)
    assert heard == []


def test_models_of_transformers_are_not_told(heard):
    pytest.importorskip("transformers", reason="pip install 'attn-core[demo]'")
    from attn_core.integrations.transformers import attention_forward

    attention_forward(torch.nn.Module(), *QUERY, MASK)
    assert [warning for warning in heard if "attn_mask" in str(warning.message)] == []


def test_kernels_that_are_functions_with_torchs_signature_are_not_told(heard):
    def plain(query, key, value, attn_mask=None, *, scale=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)

    with attn_core.register_sdpa("mine/plain", devices={"cpu"}, dtypes={torch.float32}, biases={TensorBias})(plain):
        attention(*QUERY.transpose(2, 3), MASK, kernel="mine/plain")
    assert heard == []


def test_the_numbers_are_those_of_the_bias_to_the_last_bit(heard):
    for mask in (MASK, torch.randn(2, 4, 4)):
        out = scaled_dot_product_attention(*QUERY, mask)
        assert torch.equal(out, scaled_dot_product_attention(*QUERY, TensorBias(mask)))


def test_a_graph_is_traced_in_one_piece_without_a_word_and_error_is_an_error(monkeypatch, heard):
    def call(query, key, value, mask):
        return scaled_dot_product_attention(query, key, value, mask)

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="eager")(*QUERY, MASK)
    assert torch.equal(out, scaled_dot_product_attention(*QUERY, TensorBias(MASK)))
    assert [warning for warning in heard if "attn_mask" in str(warning.message)] == []
    set_to(monkeypatch, "error")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="plain tensor is deprecated"):
        torch.compile(call, fullgraph=True, backend="eager")(*QUERY, MASK)


def test_memory_is_bounded_and_code_that_is_gone_lends_its_address_to_nobody(heard):
    source = "def call():\n    return sdpa(*operands, mask)\n"
    for _ in range(20):
        names = {"sdpa": scaled_dot_product_attention, "operands": QUERY, "mask": MASK}
        exec(source, names)
        names["call"]()
    assert len(heard) == 20
    assert len(seen) == 20
    assert len(seen) <= len(_kept) <= PLACES
