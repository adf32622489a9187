"""How unfused operations are called: names and places of arguments, bad input, autocast and nested tensors."""

from __future__ import annotations

import inspect
import warnings

import attn_natten
import pytest
import torch
from attn_core.errors import InputError, InputTypeError
from attn_natten.errors import ConstraintError, UnsupportedError
from attn_natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

CALLS = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}
EXTENTS = {1: (9,), 2: (5, 6), 3: (3, 4, 5)}
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


def operands(rank, *, dim=4, **options):
    return torch.randn(3, 2, 2, *EXTENTS[rank], dim, **options).unbind()


@each_rank
def test_arguments_have_the_names_and_places_they_have_in_natten_0_17(rank):
    qk, av = CALLS[rank]
    places = [
        [name for name, parameter in inspect.signature(call).parameters.items() if parameter.kind < 2]
        for call in (qk, av)
    ]
    assert places[0] == ["query", "key", "kernel_size", "dilation", "additional_keys", "is_causal", "rpb"]
    assert places[1] == ["attn", "value", "kernel_size", "dilation", "additional_values", "is_causal"]
    query, key, value = operands(rank)
    tokens = torch.randn(2, 2, 3, 4)
    attn = qk(query, key, 3, 1, tokens, False, torch.randn(2, *[5] * rank))
    assert attn.shape == (2, 2, *EXTENTS[rank], 3**rank + 3)
    assert av(attn, value, 3, 1, tokens, False).shape == value.shape


@each_rank
def test_a_parameter_is_one_value_or_one_for_each_axis(rank):
    qk, av = CALLS[rank]
    query, key, value = operands(rank)
    one, many = qk(query, key, 3, 1), qk(query, key, [3] * rank, (1,) * rank, is_causal=(False,) * rank)
    torch.testing.assert_close(many, one)
    torch.testing.assert_close(qk(query, key, 3, None, is_causal=None), one)
    torch.testing.assert_close(av(one, value, (3,) * rank, None, is_causal=None), av(one, value, 3))


def test_the_misspelled_name_means_the_same_and_warns_at_the_callers_line():
    query, key, value = operands(2)
    attn = na2d_qk(query, key, 3, is_causal=(True, False)).softmax(-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        misspelled = na2d_qk(query, key, 3, is_casual=(True, False)).softmax(-1)
        torch.testing.assert_close(misspelled, attn)
        out = na2d_av(attn, value, 3, is_casual=(True, False))
    torch.testing.assert_close(out, na2d_av(attn, value, 3, is_causal=(True, False)))
    assert [warning.category for warning in caught] == [DeprecationWarning] * 2
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.raises(InputError, match="is_causal, is_casual"):
        na2d_qk(query, key, 3, is_causal=True, is_casual=True)


# Bad input


@each_rank
@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ({"kernel_size": 1}, RuntimeError, "kernel_size: kernel size must be greater than 1"),
        ({"kernel_size": 3, "dilation": 0}, RuntimeError, "dilation: must be an int >= 1, got 0"),
        ({"kernel_size": 3, "dilation": 4}, RuntimeError, r"with kernel_size=3 \* dilation=4 = 12"),
        ({"kernel_size": 3.0}, ValueError, "kernel_size: takes an int"),
        ({"kernel_size": True}, ValueError, "kernel_size: takes an int"),
        ({"kernel_size": 3, "is_causal": 1}, ValueError, "is_causal: takes True or False"),
        ({"kernel_size": (3, 3, 3, 3)}, ValueError, "kernel_size: takes an int, or a tuple of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_windows_that_cannot_be_are_refused_by_both(rank, window, error, message):
    qk, av = CALLS[rank]
    query, key, value = operands(rank)
    with pytest.raises(error, match=message):
        qk(query, key, **window)
    width = window["kernel_size"] ** rank if type(window["kernel_size"]) is int else 3**rank
    attn = torch.randn(*query.shape[:-1], width)
    with pytest.raises(error, match=message):
        av(attn, value, **window)


def test_operands_that_do_not_fit_are_refused_by_name():
    query, key, value = operands(2)
    with pytest.raises(ConstraintError, match=r"key: width \(dimension 3\) must be query's 6, got 5"):
        na2d_qk(query, key[..., :5, :], 3)
    with pytest.raises(ConstraintError, match="key: must have query's dtype float32, got float64"):
        na2d_qk(query, key.double(), 3)
    with pytest.raises(ConstraintError, match="query: must be"):
        na1d_qk(query, key, 3)
    with pytest.raises(InputTypeError, match="key: takes a tensor, got list"):
        na2d_qk(query, [1], 3)
    with pytest.raises(ConstraintError, match=r"attn: the last dimension must be 9 .*, got 10"):
        na2d_av(torch.randn(2, 2, 5, 6, 10), value, 3)
    with pytest.raises(ConstraintError, match=r"attn: the last dimension must be 12 .* 3 additional tokens\), got 9"):
        na2d_av(torch.randn(2, 2, 5, 6, 9), value, 3, additional_values=torch.randn(2, 2, 3, 4))
    with pytest.raises(ValueError, match="additional_keys: head_dim"):
        na2d_qk(query, key, 3, additional_keys=torch.randn(2, 2, 3, 5))
    with pytest.raises(InputTypeError, match="attn: takes a tensor, got NoneType"):
        na2d_av(None, value, 3)
    with pytest.raises(InputTypeError, match="value: takes a tensor, got NoneType"):
        na2d_av(torch.randn(2, 2, 5, 6, 9), None, 3)
    with pytest.raises(ConstraintError, match="query: dtype must be"):
        na2d_qk(query.long(), key.long(), 3)
    with pytest.raises(ConstraintError, match="attn: dtype must be"):
        na2d_av(torch.ones(2, 2, 5, 6, 9, dtype=torch.long), value, 3)


def test_a_bias_that_cannot_be_is_refused():
    query, key, _ = operands(2)
    with pytest.raises(UnsupportedError, match="rpb: .* causal"):
        na2d_qk(query, key, 3, rpb=torch.randn(2, 5, 5), is_causal=(False, True))
    with pytest.raises(NotImplementedError, match="causal"):
        na2d_qk(query, key, 3, rpb=torch.randn(2, 5, 5), is_causal=True)
    with pytest.raises(ConstraintError, match=r"rpb: dimension 1 .* must be 5, got 6"):
        na2d_qk(query, key, 3, rpb=torch.randn(2, 6, 5))
    with pytest.raises(ConstraintError, match="rpb: .* odd kernel sizes"):
        na2d_qk(query, key, (3, 4), rpb=torch.randn(2, 5, 7))


def test_even_kernel_sizes_are_refused_where_checks_are_strict():
    query, key, value = operands(1)
    na1d_qk(query, key, 4)
    attn_natten.switches.strict.use_strict_checks()
    with pytest.raises(RuntimeError, match="odd number greater than 1, got 4"):
        na1d_qk(query, key, 4)
    with pytest.raises(RuntimeError, match="odd number greater than 1, got 4"):
        na1d_av(torch.randn(2, 2, 9, 4), value, 4)


# Other dtypes


def test_a_bias_is_cast_to_keys_dtype_and_weights_to_values():
    query, key, value = operands(2)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    attn = na2d_qk(query, key, 3, rpb=rpb)
    assert attn.dtype == torch.float32
    (grad,) = torch.autograd.grad(attn.sum(), rpb)
    assert grad.dtype == torch.float64
    out = na2d_av(attn.double(), value.half(), 3)
    assert out.dtype == torch.float16


def test_autocast_casts_operands_once_and_reaches_nothing_inside():
    query, key, value = (x.requires_grad_() for x in operands(2))
    tokens = torch.randn(2, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        attn = na2d_qk(query, key, 3, additional_keys=tokens)
        assert attn.dtype == torch.bfloat16
        weights = attn.softmax(-1)
        out = na2d_av(weights, value, 3, additional_values=tokens)
        assert out.dtype == torch.bfloat16
        in_autocast = torch.autograd.grad(out.float().sum(), (query, key, value), retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 for grad in outside)
    assert all(torch.equal(one, other) for one, other in zip(in_autocast, outside))
    low = [x.detach().bfloat16() for x in (query, key, tokens)]
    torch.testing.assert_close(attn, na2d_qk(*low[:2], 3, additional_keys=low[2]))
    double = query.detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d_qk(double, double, 3).dtype == torch.float64


# Nested tensors


def nested(*tensors, **options):
    return torch.nested.nested_tensor(list(tensors), **options)


SHAPES = [(1, 2, 14, 16), (2, 8, 16, 32), (4, 1, 32, 16)]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "tokens"])
def test_each_element_of_a_nested_tensor_is_computed_by_itself(biased):
    queries, keys, values = ([torch.randn(shape) for shape in SHAPES] for _ in range(3))
    tokens = [torch.randn(*shape[:2], 3, shape[-1]) for shape in SHAPES]
    options = {"additional_keys": nested(*tokens)} if biased else {}
    attn = na1d_qk(nested(*queries), nested(*keys), 7, 2, **options)
    assert attn.is_nested
    expected = [
        na1d_qk(query, key, 7, 2, additional_keys=token if biased else None)
        for query, key, token in zip(queries, keys, tokens)
    ]
    assert len(attn.unbind()) == len(expected)
    for got, want in zip(attn.unbind(), expected):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    options = {"additional_values": nested(*tokens)} if biased else {}
    out = na1d_av(attn, nested(*values), 7, 2, **options)
    for got, weights, value, token in zip(out.unbind(), expected, values, tokens):
        want = na1d_av(weights, value, 7, 2, additional_values=token if biased else None)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_a_bias_beside_nested_tensors_is_a_plain_one_for_all():
    grids = [torch.randn(1, 2, 5, 7, 4), torch.randn(2, 2, 6, 3, 8)]
    rpb = torch.randn(2, 5, 5)
    attn = na2d_qk(nested(*grids), nested(*grids), 3, rpb=rpb)
    for got, grid in zip(attn.unbind(), grids):
        torch.testing.assert_close(got, na2d_qk(grid, grid, 3, rpb=rpb), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="rpb: takes a plain tensor"):
        na2d_qk(nested(*grids), nested(*grids), 3, rpb=nested(rpb, rpb))


def test_jagged_tensors_come_back_jagged():
    grids = [torch.randn(2, length, 4) for length in (5, 8)]
    jagged = torch.nested.nested_tensor([grid.transpose(0, 1) for grid in grids], layout=torch.jagged)
    query = jagged.transpose(1, 2)  # [2, heads, ragged, dim]
    with pytest.raises(ConstraintError, match="query: must be"):  # an element has a batch of its own
        na1d_qk(query, query, 3)


def test_nested_tensors_that_do_not_fit_are_refused_by_name():
    some = [torch.randn(shape) for shape in SHAPES]
    query, shorter = nested(*some), nested(*some[:2])
    with pytest.raises(ValueError, match="key: takes a nested tensor, as query is; got a plain one"):
        na1d_qk(query, some[0], 7)
    with pytest.raises(ValueError, match="attn: takes a nested tensor, as value is; got a plain one"):
        na1d_av(some[0], query, 7)
    with pytest.raises(ValueError, match="additional_keys: takes a nested tensor"):
        na1d_qk(query, query, 7, additional_keys=torch.randn(1, 2, 3, 16))
    with pytest.raises(ValueError, match="equally many elements, got query of 3, key of 2"):
        na1d_qk(query, shorter, 7)
    with pytest.raises(ValueError, match="autograd is not supported for nested tensors"):
        na1d_qk(nested(*some, requires_grad=True), query, 7)
    with pytest.raises(ValueError, match="rpb: autograd is not supported for nested tensors"):
        na1d_qk(query, query, 7, rpb=torch.randn(2, 13, requires_grad=True))
    with pytest.raises(ConstraintError, match="key: batch"):
        na1d_qk(query, nested(*some[1:], some[0]), 7)
