"""The API of PyTorch's RFC of biases as objects (pytorch/pytorch#110681): its examples, as they are written there."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import Optional

import attn_core
import pytest
import torch
import torch.nn.functional as F
from attn_core import (
    ALiBi,
    AttnBias,
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    Mask,
    attention,
    explain,
    plan,
    record,
    reference_attention,
    scaled_dot_product_attention,
)

# ruff: noqa: UP045  (the RFC's own text)


# The RFC's own class, pasted


class TensorBias(AttnBias):
    """A bias that is a tensor"""

    def __init__(self, bias: torch.Tensor):
        self.bias = bias

    def materialize(self, device: Optional[torch.device] = None) -> torch.Tensor:
        return self.bias

    def needs_materialization(self) -> bool:
        return True

    @staticmethod
    def dispatch(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: TensorBias,
        causal: bool,
        scale: Optional[float],
        dropout_p: float,
    ) -> torch.Tensor:
        raise NotImplementedError("TensorBias requires materialization, so this should never be called!")

    def __repr__(self) -> str:
        return f"TensorBias(bias={self.bias})"


def sdpa_prototype(query, key, value, attn_mask=None, causal=False, scale=None, dropout_p=0.0):
    """The RFC's prototype, but for the warning."""
    assert attn_mask is None or isinstance(attn_mask, (AttnBias, torch.Tensor))
    if isinstance(attn_mask, torch.Tensor):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, causal, scale=scale)
    if attn_mask is None or attn_mask.needs_materialization():
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask.materialize(query.device) if attn_mask else None,
            dropout_p=dropout_p,
            is_causal=causal,
            scale=scale,
        )
    return attn_mask.dispatch(query, key, value, attn_mask, causal, scale, dropout_p)


# Biases that a user might write: plain classes, whose attributes have whatever names


class Table(AttnBias):
    """Materializes; has attributes by names that biases of the core have, too."""

    def __init__(self, table):
        self.mask = table
        self.device = "nowhere"
        self.key = ["not", "hashable"]
        self.lengths = [1, 2, 3]
        self.scores = self.held = self.at = self.requires_grad = self.batch_and_heads = None

    def materialize(self, device=None):
        return self.mask.to(device)

    def needs_materialization(self):
        return True

    @staticmethod
    def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
        raise NotImplementedError


class Slope(AttnBias):
    """Brings its own call, and remembers what it was called with."""

    def __init__(self, slope):
        self.slope = slope
        self.device = self.mask = self.lengths = None
        self.calls = []

    def materialize(self, device=None):
        raise NotImplementedError

    def needs_materialization(self):
        return False

    @staticmethod
    def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
        attn_bias.calls.append((tuple(query.shape), tuple(key.shape), causal, scale, dropout_p))
        return F.scaled_dot_product_attention(query, key, value, attn_bias.added(query, key, causal), scale=scale)

    def added(self, query, key, causal):
        q, k = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
        added = -self.slope * (q - k).abs()
        return added.masked_fill(k > q, float("-inf")) if causal else added


class Plain(Slope):
    """The same, remembering nothing, so that it can be traced."""

    @staticmethod
    def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
        return F.scaled_dot_product_attention(query, key, value, attn_bias.added(query, key, causal), scale=scale)


@pytest.fixture
def operands():
    torch.manual_seed(20261121)
    return torch.randn(3, 2, 4, 5, 8).unbind()


@pytest.fixture
def table():
    torch.manual_seed(20261122)
    return torch.randn(4, 5, 5)


def heads_last(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


# What every bias answers


@pytest.mark.parametrize("missing", ["materialize", "needs_materialization", "dispatch"])
def test_a_class_that_lacks_one_of_the_three_methods_cannot_be_made(missing):
    methods = {name: vars(TensorBias)[name] for name in ("materialize", "needs_materialization", "dispatch")}
    del methods[missing]
    with pytest.raises(TypeError, match=f"abstract.*{missing}"):
        type("Lacking", (AttnBias,), methods)()


def test_the_base_has_these_three_abstract_methods_and_no_others():
    assert issubclass(AttnBias, ABC)
    assert AttnBias.__abstractmethods__ == {"materialize", "needs_materialization", "dispatch"}
    assert isinstance(vars(AttnBias)["dispatch"], staticmethod)


def test_a_tensor_bias_gives_the_very_tensor_needs_materialization_and_never_dispatches(operands, table):
    bias = attn_core.TensorBias(bias=table)
    assert bias.bias is bias.tensor is bias.materialize() is bias.materialize(torch.device("cpu")) is table
    assert bias.materialize("meta").device.type == "meta"
    assert bias.needs_materialization() is True
    with pytest.raises(NotImplementedError, match="needs materialization"):
        bias.dispatch(*operands, bias, False, None, 0.0)


@pytest.mark.parametrize("bias", [Causal(), ALiBi(4), Causal() + ALiBi(4), KeyPadding([3, 5])], ids=repr)
def test_a_bias_of_the_core_dispatches_to_this_library_with_torchs_layout(operands, bias):
    assert bias.needs_materialization() is False
    out = bias.dispatch(*operands, bias, False, 0.5, 0.0)
    expected, _ = reference_attention(*heads_last(*operands), bias, scale=0.5)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sdpa_prototype(*operands, bias, scale=0.5), out)


# Biases that materialize


@pytest.mark.parametrize("kind", [TensorBias, Table, attn_core.TensorBias])
def test_a_users_tensor_bias_gives_what_the_rfcs_prototype_gives(kind, operands, table):
    for options in ({}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(*operands, attn_mask=table, **options)
        torch.testing.assert_close(scaled_dot_product_attention(*operands, kind(table), **options), expected)
        out = attention(*heads_last(*operands), kind(table), **options)
        torch.testing.assert_close(out.transpose(1, 2), expected)


def test_what_it_materializes_now_counts_not_what_it_did_before(operands, table):
    bias = Table(table)
    for scale in (1.0, -3.0):
        bias.mask = scale * table
        expected = F.scaled_dot_product_attention(*operands, attn_mask=scale * table)
        torch.testing.assert_close(scaled_dot_product_attention(*operands, bias), expected)


def test_it_is_asked_for_querys_device(operands, table):
    asked = []

    class Asked(Table):
        def materialize(self, device=None):
            asked.append(device)
            return self.mask

    scaled_dot_product_attention(*operands, Asked(table))
    assert asked == [operands[0].device]


def test_a_boolean_one_masks_and_an_empty_row_is_zero(operands):
    kept = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    out = scaled_dot_product_attention(*operands, TensorBias(kept))
    assert torch.equal(out[:, :, 0], torch.zeros(2, 4, 8))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*operands, attn_mask=kept))


def test_beside_is_causal_it_is_taken_together_with_the_causal_mask(operands, table):
    expected = F.scaled_dot_product_attention(*operands, attn_mask=table + Slope(0.0).added(*operands[:2], True))
    for bias in (TensorBias(table), attn_core.TensorBias(table)):
        for flag in ("causal", "is_causal"):
            torch.testing.assert_close(scaled_dot_product_attention(*operands, bias, **{flag: True}), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (4, 3, 5),
            r"Table\.materialize gave \[4, 3, 5\].*seqlen_q=5, seqlen_kv=5\]: seqlen_q is 3",
        ),
        ((4, 5, 7), "seqlen_kv is 7"),
        ((2, 3), "seqlen_q is 2, seqlen_kv is 3"),
        ((3, 5, 5), r"from Table\.materialize\) was made for num_heads=3, got num_heads=4"),
        ((3, 1, 5, 5), r"from Table\.materialize\) was made for batch=3, got batch=2"),
        ((1, 1, 1, 5, 5), "it has 5 dimensions"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_an_error_that_names_the_class_the_axis_and_the_numbers(operands, shape, message):
    with pytest.raises(InputError, match=message):
        attention(*heads_last(*operands), Table(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (torch.zeros(5, 5, dtype=torch.long), r"Table\.materialize: must give a boolean tensor .* got torch\.int64"),
        ([[0.0]], r"Table\.materialize: must give a tensor, got list"),
    ],
    ids=["integers", "a list"],
)
def test_anything_but_a_bias_is_an_error_that_names_the_class(operands, gives, message):
    class Giving(Table):
        def materialize(self, device=None):
            return self.mask

    Giving.__name__ = "Table"
    with pytest.raises(InputTypeError, match=message):
        scaled_dot_product_attention(*operands, Giving(gives))


# Biases that bring their own call


def test_dispatch_is_called_by_position_in_the_rfcs_order_with_what_was_asked(operands):
    bias = Slope(0.5)
    out = scaled_dot_product_attention(*operands, bias, dropout_p=0.25, scale=0.125)
    assert bias.calls == [((2, 4, 5, 8), (2, 4, 5, 8), False, 0.125, 0.25)]
    torch.testing.assert_close(out, sdpa_prototype(*operands, bias, scale=0.125))


@pytest.mark.parametrize("flag", ["causal", "is_causal"])
def test_dispatch_gets_the_causal_flag_and_the_default_scale_as_none(operands, flag):
    bias = Slope(0.5)
    out = scaled_dot_product_attention(*operands, bias, **{flag: True})
    assert bias.calls[0][2:] == (True, None, 0.0)
    torch.testing.assert_close(out, sdpa_prototype(*operands, bias, causal=True))


def test_from_attention_dispatch_gets_torchs_layout_and_the_result_comes_back_in_attentions(operands):
    query, key, value = operands
    bias = Slope(0.5)
    out = attention(*heads_last(query, key[:, :, :3], value[:, :, :3]), bias)
    assert bias.calls[0][:2] == ((2, 4, 5, 8), (2, 4, 3, 8))
    expected = sdpa_prototype(query, key[:, :, :3], value[:, :, :3], bias)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("door", ["attention", "scaled_dot_product_attention"])
def test_dispatch_is_not_told_of_shared_key_heads_so_each_query_head_gets_its_own(operands, door):
    query, key, value = operands[0], operands[1][:, :2], operands[2][:, :2]
    expected = sdpa_prototype(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), Slope(0.5))
    if door == "attention":
        out = attention(*heads_last(query, key, value), Slope(0.5)).transpose(1, 2)
    else:
        out = scaled_dot_product_attention(query, key, value, Slope(0.5), enable_gqa=True)
    torch.testing.assert_close(out, expected)


def test_dispatch_takes_any_leading_dimensions_where_torch_does(operands):
    query = operands[0].unflatten(1, (2, 2))
    torch.testing.assert_close(
        scaled_dot_product_attention(query, query, query, Slope(1.0)), sdpa_prototype(query, query, query, Slope(1.0))
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [({"softcap": 5.0}, "softcap"), ({"return_lse": True}, "return_lse"), ({"kernel": "torch/math"}, "kernel")],
    ids=["softcap", "return_lse", "kernel"],
)
def test_what_dispatch_has_no_argument_for_is_an_error_never_ignored(operands, options, named):
    for call in (attention, explain):
        with pytest.raises(InputError, match=f"{named}: not for Slope, which brings its own dispatch"):
            call(*heads_last(*operands), Slope(1.0), **options)


def test_a_result_that_is_none_is_an_error_that_names_the_class(operands):
    class Wrong(Slope):
        @staticmethod
        def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
            return query[0] if attn_bias.slope else None

    with pytest.raises(InputTypeError, match=r"Wrong\.dispatch: must give .* got NoneType"):
        scaled_dot_product_attention(*operands, Wrong(0.0))
    with pytest.raises(InputTypeError, match=r"Wrong\.dispatch: must give .* got shape \[4, 5, 8\]"):
        attention(*heads_last(*operands), Wrong(1.0))


def test_what_dispatch_raises_is_raised(operands):
    class Failing(Slope):
        @staticmethod
        def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attention(*heads_last(*operands), Failing(1.0))


def test_record_and_explain_name_the_class(operands, table):
    with record() as calls:
        for _ in range(2):
            scaled_dot_product_attention(*operands, Slope(1.0))
        attention(*heads_last(*operands), Slope(1.0))
        attention(*heads_last(*operands), TensorBias(table))
    assert calls.kernels == {"bias/Slope": 3, explain(*heads_last(*operands), TensorBias(table)).chosen: 1}
    explained = explain(*operands, Slope(1.0), layout="heads-first")
    assert explained.chosen == "bias/Slope"
    assert "its own dispatch" in str(explained)


def test_a_mask_of_a_stranger_may_bring_its_own_call_or_materialize(operands):
    class Diagonal(Mask):
        def keep(self, b, h, q, k):
            return q == k

    class Quick(Diagonal):
        @staticmethod
        def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
            return value.clone()

    for kind, kernel in ((Diagonal, None), (Quick, "bias/Quick")):
        with record() as calls:
            torch.testing.assert_close(scaled_dot_product_attention(*operands, kind()), operands[2])
        assert kernel in (None, *calls.kernels)
    joined = scaled_dot_product_attention(*operands, Quick() & Causal())  # by its rule, as any mask
    torch.testing.assert_close(joined, operands[2])


# Where neither has a place


def test_a_plan_keeps_no_bias_that_is_asked_anew_at_every_call(operands, table):
    for bias in (TensorBias(table), Slope(1.0)):
        with pytest.raises(InputTypeError, match="is asked anew at every call"):
            plan(*heads_last(*operands), bias)


def test_it_joins_no_sum(operands, table):
    for bias in (TensorBias(table), Slope(1.0)):
        with pytest.raises(InputTypeError, match=r"write TensorBias\(bias\.materialize\(device\)\) in its place"):
            Causal() + bias


def test_the_reference_takes_one_that_materializes_and_no_other(operands, table):
    out, _ = reference_attention(*heads_last(*operands), TensorBias(table))
    expected = F.scaled_dot_product_attention(*operands, attn_mask=table).transpose(1, 2)
    torch.testing.assert_close(out.float(), expected)
    with pytest.raises(InputTypeError, match="Slope brings its own dispatch"):
        reference_attention(*heads_last(*operands), Slope(1.0))


def test_anything_but_none_a_tensor_or_a_bias_is_a_type_error(operands):
    with pytest.raises(TypeError, match="takes None, AttnBias, .*got dict"):
        scaled_dot_product_attention(*operands, {})


# causal beside is_causal


def test_the_two_names_of_the_flag_must_agree(operands):
    with pytest.raises(InputError, match="is_causal, causal: two names"):
        scaled_dot_product_attention(*operands, is_causal=True, causal=False)
    expected = F.scaled_dot_product_attention(*operands, is_causal=True)
    for flags in ({"causal": True}, {"causal": True, "is_causal": True}, {"is_causal": True}):
        torch.testing.assert_close(scaled_dot_product_attention(*operands, **flags), expected)
    plain = F.scaled_dot_product_attention(*operands)
    torch.testing.assert_close(scaled_dot_product_attention(*operands, causal=False), plain)


@pytest.mark.parametrize(
    "bias",
    [Causal(), Causal("bottom-right"), Causal() & KeyPadding([3, 5]), Causal() + ALiBi(4)],
    ids=repr,
)
def test_a_causal_bias_beside_is_causal_is_an_error(operands, bias):
    with pytest.raises(ValueError, match="is_causal: must be False beside .* which is causal by itself"):
        scaled_dot_product_attention(*operands, bias, is_causal=True)


@pytest.mark.parametrize("bias", [ALiBi(4), KeyPadding([3, 5])], ids=repr)
def test_any_other_bias_beside_is_causal_is_taken_together_with_it(operands, bias):
    out = scaled_dot_product_attention(*operands, bias, is_causal=True)
    expected, _ = reference_attention(*heads_last(*operands), Causal("top-left") + bias)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


# Gradients, copies, graphs


def by_attention(query, key, value, bias):
    return attention(*heads_last(query, key, value), bias).transpose(1, 2)


@pytest.mark.parametrize("call", [scaled_dot_product_attention, by_attention])
@pytest.mark.parametrize("kind", ["materialize", "dispatch"])
def test_a_gradient_reaches_a_tensor_that_the_bias_holds(operands, kind, call):
    def gradient(call):
        slope = torch.tensor(0.7, requires_grad=True)
        bias = Slope(slope) if kind == "dispatch" else Table(slope * Slope(1.0).added(*operands[:2], False))
        call(*operands, bias).square().sum().backward()
        return slope.grad

    assert gradient(sdpa_prototype).abs() > 1e-3
    torch.testing.assert_close(gradient(call), gradient(sdpa_prototype))


def test_training_a_table_by_steps_sees_each_step(operands):
    table = torch.zeros(4, 5, 5, requires_grad=True)
    bias = TensorBias(table)
    losses = []
    for _ in range(3):
        loss = scaled_dot_product_attention(*operands, bias).square().sum()
        (grad,) = torch.autograd.grad(loss, table)
        table.data -= 0.5 * grad
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_two_of_the_same_class_and_fields_are_equal_and_it_has_no_key(table):
    one, same, other = TensorBias(table), TensorBias(table.clone()), TensorBias(table + 1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    with pytest.raises(InputTypeError, match="TensorBias: known by its methods alone"):
        one.key  # noqa: B018


def pickled(bias):
    return pickle.loads(pickle.dumps(bias))


@pytest.mark.parametrize("bias", [TensorBias(torch.ones(5, 5)), Slope(0.5)], ids=["materialize", "dispatch"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_it_gives_the_same(operands, bias, copied):
    out = scaled_dot_product_attention(*operands, copied(bias))
    assert torch.equal(out, scaled_dot_product_attention(*operands, bias))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["materialize", "dispatch"])
def test_it_is_traced_into_one_graph_and_recorded(operands, table, kind, causal):
    torch._dynamo.reset()
    bias = TensorBias(table) if kind == "materialize" else Plain(0.5)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(query, key, value, bias):
        return scaled_dot_product_attention(query, key, value, bias, is_causal=causal)

    with record() as calls:
        out = compiled(*operands, bias)
    torch.testing.assert_close(out, scaled_dot_product_attention(*operands, bias, is_causal=causal))
    assert [row.compiled for row in calls] == [True]
    assert next(iter(calls.kernels)).startswith("bias/Plain" if kind == "dispatch" else "torch/")


# torch's names


def test_torchs_names_are_there_at_the_module_path_that_replaces_torchs():
    from attn_core.bias import CausalBias, CausalVariant, causal_lower_right, causal_upper_left

    assert [(each.name, each.value) for each in CausalVariant] == [("UPPER_LEFT", 1), ("LOWER_RIGHT", 2)]
    assert attn_core.causal_upper_left is causal_upper_left
    assert CausalBias(CausalVariant.UPPER_LEFT, 3, 4) == causal_upper_left(3, 4) == Causal("top-left").bind(3, 4)
    assert CausalBias(CausalVariant.LOWER_RIGHT, 3, 4) == causal_lower_right(3, 4) == Causal("bottom-right").bind(3, 4)


def test_the_variants_are_the_rfcs_matrices():
    ones = torch.ones(3, 4, dtype=torch.int)
    upper, lower = attn_core.causal_upper_left(3, 4), attn_core.causal_lower_right(3, 4)
    assert torch.equal(upper.materialize().int(), ones.tril())
    assert torch.equal(lower.materialize().int(), ones.tril(1))
    assert upper.draw() == "█···\n██··\n███·"
    assert attn_core.causal_lower_right(5, 3).draw() == "···\n···\n█··\n██·\n███"


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
@pytest.mark.parametrize("name", ["causal_upper_left", "causal_lower_right"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(3, 4), (4, 3), (4, 4)])
def test_they_give_what_torchs_own_give_and_torchs_own_are_taken(name, seqlen_q, seqlen_kv):
    from torch.nn.attention import bias as torchs

    torch.manual_seed(20261121)
    query, key, value = torch.randn(2, 4, seqlen_q, 8), *torch.randn(2, 2, 4, seqlen_kv, 8)
    expected = F.scaled_dot_product_attention(query, key, value, getattr(torchs, name)(seqlen_q, seqlen_kv))
    for module in (attn_core, torchs):
        for _ in range(2):  # the second time from what was kept
            out = scaled_dot_product_attention(query, key, value, getattr(module, name)(seqlen_q, seqlen_kv))
            torch.testing.assert_close(out, expected)
    variant = torchs.CausalVariant.LOWER_RIGHT
    assert attn_core.CausalBias(variant, seqlen_q, seqlen_kv) == Causal("bottom-right").bind(seqlen_q, seqlen_kv)


def test_sizes_are_checked_as_torch_does_not(operands):
    from torch.nn.attention import bias as torchs

    for module in (attn_core, torchs):
        with pytest.raises(InputError, match="seqlen_q=7, seqlen_kv=9, got seqlen_q=5, seqlen_kv=5"):
            scaled_dot_product_attention(*operands, module.causal_upper_left(7, 9))
    with pytest.raises(TypeError):
        attn_core.causal_upper_left(5)
    with pytest.raises(InputError, match="seq_len_kv: must be an int >= 0, got -1"):
        attn_core.causal_lower_right(5, -1)
    with pytest.raises(InputError, match="seq_len_q: must be an int >= 0, got 5.0"):
        attn_core.causal_upper_left(5.0, 5)
    with pytest.raises(InputError, match=r"variant: must be CausalVariant\.UPPER_LEFT or .* got 3"):
        attn_core.CausalBias(3, 5, 5)


def test_torchs_own_beside_is_causal_is_an_error(operands):
    from torch.nn.attention.bias import causal_upper_left

    with pytest.raises(ValueError, match="causal by itself"):
        scaled_dot_product_attention(*operands, causal_upper_left(5, 5), is_causal=True)
