"""What is passed in: every constraint has an error that names the argument, what is accepted and what was given."""

from __future__ import annotations

import warnings

import pytest
import torch
from attn_core import AttnError, Neighborhood
from attn_core.errors import InputError, InputTypeError
from attn_natten.arguments import (
    causal_alias,
    check_additional,
    check_additional_heads_first,
    check_heads_first,
    check_heads_last,
    check_rpb,
    check_rpb_has_no_tangents,
    check_rpb_is_possible,
    check_weights,
    has_tangents,
    neighborhood,
    of_each_axis,
    window,
)
from attn_natten.errors import ConstraintError, UnsupportedError
from attn_natten.switches.strict import use_strict_checks
from torch.autograd import forward_ad

BATCH, HEADS, HEIGHT, WIDTH, DIM = 2, 4, 6, 7, 8


def heads_last(*, batch=BATCH, height=HEIGHT, width=WIDTH, heads=HEADS, dim=DIM, **options):
    return torch.zeros(batch, height, width, heads, dim, **options)


def heads_first(*, batch=BATCH, heads=HEADS, height=HEIGHT, width=WIDTH, dim=DIM, **options):
    return torch.zeros(batch, heads, height, width, dim, **options)


# Errors


def test_a_constraint_is_caught_as_natten_0_17_and_as_0_21_raise_it():
    for builtin in (RuntimeError, ValueError, AttnError):
        with pytest.raises(builtin, match="greater than 1"):
            neighborhood((7,), 1)


def test_what_is_not_implemented_is_a_not_implemented_error_and_one_of_attn():
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(UnsupportedError, AttnError)


# One value, or one for each axis


@pytest.mark.parametrize("value", [3, (3, 3), [3, 3]], ids=str)
def test_a_parameter_is_one_value_or_a_tuple_or_a_list(value):
    assert of_each_axis("kernel_size", value, 2) == (3, 3)


def test_a_shape_is_a_tuple_too():
    assert of_each_axis("kernel_size", torch.Size([3, 5]), 2) == (3, 5)


@pytest.mark.parametrize(
    "value", [True, (3, True), 3.0, "3", (3, "3"), None, (3, None), (3,), (3, 3, 3), [], {3, 5}], ids=str
)
def test_any_other_kernel_size_is_refused_by_name_and_value(value):
    with pytest.raises(InputError) as error:
        neighborhood((9, 9), value)
    assert str(error.value) == (f"kernel_size: takes an int, or a tuple of 2 ints, one for each axis; got {value!r}")


@pytest.mark.parametrize("name", ["dilation", "stride"])
@pytest.mark.parametrize("value", [True, 1.0, "1", (1,), (1, 1, 1), (1, None)], ids=str)
def test_any_other_dilation_or_stride_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name}: takes an int, or a tuple of 2 ints") as error:
        neighborhood((9, 9), 3, **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [1, 0, (True, 1), "True", (True,), (True, False, True), 1.0], ids=str)
def test_any_other_is_causal_is_refused_by_name_and_value(value):
    with pytest.raises(ValueError, match="^is_causal: takes True or False, or a tuple of 2 bools") as error:
        neighborhood((9, 9), 3, is_causal=value)
    assert repr(value) in str(error.value)


def test_none_is_the_default_of_stride_dilation_and_is_causal():
    assert window(2, 3, stride=None, dilation=None, is_causal=None) == ((3, 3), (1, 1), (1, 1), (False, False))


# The neighborhood


def test_the_bias_is_the_cores():
    made = neighborhood((6, 7), (3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(True, False))
    assert made == Neighborhood((6, 7), kernel_size=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(True, False))


@pytest.mark.parametrize("kernel", [1, 0, -3])
def test_a_kernel_size_is_greater_than_1_on_each_axis(kernel):
    with pytest.raises(ConstraintError, match=f"^kernel_size: .*greater than 1.*got {kernel} on axis 1$"):
        neighborhood((9, 9), (3, kernel))


@pytest.mark.parametrize("dilation", [0, -1])
def test_a_dilation_is_at_least_1(dilation):
    with pytest.raises(ConstraintError, match=f"^dilation: must be an int >= 1, got {dilation} on axis 0$"):
        neighborhood((9, 9), 3, dilation=(dilation, 1))


@pytest.mark.parametrize("stride", [0, -1, 4])
def test_a_stride_is_from_1_to_the_kernel_size(stride):
    with pytest.raises(ConstraintError, match=f"^stride: must be from 1 to kernel_size=3, got {stride} on axis 1$"):
        neighborhood((9, 9), 3, stride=(3, stride))


@pytest.mark.parametrize(
    ("spatial", "called"),
    [((20, 6), r"width \(axis 1\)"), ((6, 20), r"height \(axis 0\)"), ((20, 20, 6), r"width \(axis 2\)")],
    ids=str,
)
def test_an_axis_holds_kernel_size_times_dilation_tokens_and_the_error_has_all_three_numbers(spatial, called):
    with pytest.raises(ConstraintError, match=f"{called} is 6, with kernel_size=5 \\* dilation=2 = 10"):
        neighborhood(spatial, 5, dilation=2)


def test_an_axis_of_just_that_many_tokens_is_taken():
    assert neighborhood((6,), 3, dilation=2).extents == (6,)


@pytest.mark.parametrize("spatial", [(), (4, 4, 4, 4)], ids=str)
def test_there_are_1_to_3_axes(spatial):
    with pytest.raises(ConstraintError, match=f"^spatial: takes 1 to 3 axes, got {len(spatial)}"):
        neighborhood(spatial, 3)


def test_even_kernel_sizes_are_taken_unless_checks_are_strict():
    assert neighborhood((8,), 4).kernel_size == (4,)
    use_strict_checks()
    with pytest.raises(ConstraintError, match="^kernel_size: .*odd number greater than 1, got 4 on axis 0"):
        neighborhood((8,), 4)
    use_strict_checks(False)
    assert neighborhood((8,), 4).kernel_size == (4,)


def test_a_parameter_may_depend_on_no_tensor_and_is_checked_all_the_same():
    with pytest.raises(ConstraintError, match="stride"):
        window(3, 3, stride=5)


# is_casual


def test_the_misspelled_name_is_taken_with_a_warning_at_the_callers_line():
    def operation(is_causal=False, is_casual=None):
        return causal_alias(is_causal, is_casual)

    with pytest.warns(DeprecationWarning, match="is_casual is a misspelling of is_causal") as caught:
        assert operation(is_casual=(True, False)) == (True, False)
    assert caught[0].filename == __file__


def test_the_right_name_is_taken_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert causal_alias((True, False), None) == (True, False)


@pytest.mark.parametrize("is_causal", [True, (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("is_casual", [True, False, (True, True)], ids=str)
def test_both_names_at_once_are_an_error_that_shows_both(is_causal, is_casual):
    with pytest.raises(InputError, match="^is_causal, is_casual: two names of one argument") as error:
        causal_alias(is_causal, is_casual)
    assert f"is_causal={is_causal!r}" in str(error.value)
    assert f"is_casual={is_casual!r}" in str(error.value)


def test_a_graph_takes_the_misspelled_name_without_a_break():
    def operation(x, is_casual=None):
        return x + 1 if causal_alias(False, is_casual) else x

    traced = torch.compile(operation, fullgraph=True, backend="eager")
    with pytest.warns(DeprecationWarning, match="is_casual"):
        assert traced(torch.zeros(1), is_casual=True).item() == 1


# Fused operands


def test_the_spatial_shape_of_fused_operands_comes_back():
    query = heads_last()
    assert check_heads_last(query, query, query, 2) == (HEIGHT, WIDTH)


def test_fewer_heads_of_keys_and_another_head_dim_of_values_are_taken():
    assert check_heads_last(heads_last(), heads_last(heads=2), heads_last(heads=2, dim=5), 2) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_fused_operand_is_a_tensor(name):
    operands = {"query": heads_last(), "key": heads_last(), "value": heads_last()} | {name: [0.0]}
    with pytest.raises(InputTypeError, match=f"^{name}: takes a tensor, got list$"):
        check_heads_last(**operands, rank=2)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_nested_fused_operand_is_not_implemented(name, layout):
    nested = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(5, 4)], layout=layout)
    operands = {"query": heads_last(), "key": heads_last(), "value": heads_last()} | {name: nested}
    with pytest.raises(NotImplementedError, match=f"^{name}: takes plain tensors here, got a nested one$"):
        check_heads_last(**operands, rank=2)


def test_a_sparse_fused_operand_is_not_implemented():
    query = heads_last()
    with pytest.raises(NotImplementedError, match="^key: takes plain tensors, got one of layout torch.sparse_coo$"):
        check_heads_last(query, query.to_sparse(), query, 2)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (2, 3, 6, 7, 4, 8)], ids=str)
def test_a_fused_operand_of_another_rank_is_refused_with_the_names_of_its_dimensions(name, shape):
    operands = {"query": heads_last(), "key": heads_last(), "value": heads_last()} | {name: torch.zeros(shape)}
    with pytest.raises(ConstraintError) as error:
        check_heads_last(**operands, rank=2)
    assert str(error.value) == (
        f"{name}: must be [batch, height, width, num_heads, head_dim], 5 dimensions; got {len(shape)}"
        f" (shape {list(shape)})"
    )


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("key", {"batch": 3}, r"batch \(dimension 0\) must be query's 2, got 3 \(shape \[3, 6, 7, 4, 8\]\)"),
        ("value", {"batch": 3}, r"batch \(dimension 0\) must be query's 2, got 3"),
        ("key", {"height": 5}, r"height \(dimension 1\) must be query's 6, got 5"),
        ("value", {"height": 5}, r"height \(dimension 1\) must be query's 6, got 5"),
        ("key", {"width": 5}, r"width \(dimension 2\) must be query's 7, got 5"),
        ("value", {"width": 5}, r"width \(dimension 2\) must be query's 7, got 5"),
        ("value", {"heads": 2}, r"num_heads \(dimension 3\) must be key's 4, got 2"),
        ("key", {"dim": 5}, r"head_dim \(dimension 4\) must be query's 8, got 5"),
    ],
    ids=str,
)
def test_a_fused_operand_of_another_size_is_refused_by_dimension(name, changed, message):
    operands = {"query": heads_last(), "key": heads_last(), "value": heads_last()} | {name: heads_last(**changed)}
    with pytest.raises(ConstraintError, match=f"^{name}: {message}"):
        check_heads_last(**operands, rank=2)


@pytest.mark.parametrize("heads", [3, 8, 0])
def test_heads_of_keys_divide_those_of_queries(heads):
    few = heads_last(heads=heads)
    with pytest.raises(ConstraintError, match=f"^key: num_heads must divide query's num_heads=4, got {heads}$"):
        check_heads_last(heads_last(), few, few, 2)


@pytest.mark.parametrize("name", ["key", "value"])
def test_fused_operands_are_of_one_dtype(name):
    operands = {"query": heads_last(), "key": heads_last(), "value": heads_last()}
    operands[name] = heads_last(dtype=torch.float16)
    with pytest.raises(ConstraintError, match=f"^{name}: must have query's dtype float32, got float16$"):
        check_heads_last(**operands, rank=2)


def test_dtypes_that_autocast_makes_one_are_one():
    query, key = heads_last(), heads_last(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert check_heads_last(query, key, query, 2) == (HEIGHT, WIDTH)
        with pytest.raises(ConstraintError, match="^value: must have query's dtype float32, got float64$"):
            check_heads_last(query, key, query.double(), 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_fused_operand_of_another_dtype_is_refused(dtype):
    query = heads_last(dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ConstraintError, match=f"^query: dtype must be one of float64, float32, float16, bfloat16, got {name}$"
    ):
        check_heads_last(query, query, query, 2)


def test_fused_operands_are_on_one_device():
    query = heads_last()
    with pytest.raises(ConstraintError, match="^value: must be on query's device cpu, got meta$"):
        check_heads_last(query, query, query.to("meta"), 2)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.float16, 8), (torch.bfloat16, 8)], ids=str)
@pytest.mark.parametrize("name", ["query", "value"])
def test_any_head_dim_is_taken_unless_checks_are_strict(dtype, multiple, name):
    odd, even = heads_last(dim=multiple + 2, dtype=dtype), heads_last(dim=multiple, dtype=dtype)
    query, value = (odd, even) if name == "query" else (even, odd)
    assert check_heads_last(query, query, value, 2) == (HEIGHT, WIDTH)
    use_strict_checks()
    assert check_heads_last(even, even, even, 2) == (HEIGHT, WIDTH)
    with pytest.raises(
        ConstraintError, match=f"^{name}: head_dim must be a multiple of {multiple} for .*, got {multiple + 2};"
    ):
        check_heads_last(query, query, value, 2)


def test_float64_is_taken_unless_checks_are_strict():
    query = heads_last(dtype=torch.float64)
    assert check_heads_last(query, query, query, 2) == (HEIGHT, WIDTH)
    use_strict_checks()
    with pytest.raises(ConstraintError, match="^query: dtype must be one of float32, float16, bfloat16 .*got float64"):
        check_heads_last(query, query, query, 2)


def test_fewer_heads_of_keys_are_taken_unless_checks_are_strict():
    few = heads_last(heads=2)
    use_strict_checks()
    with pytest.raises(ConstraintError, match="^key: num_heads must be query's 4, got 2"):
        check_heads_last(heads_last(), few, few, 2)


# Additional keys and values


def more(*, batch=BATCH, length=5, heads=HEADS, dim=DIM, **options):
    return torch.zeros(batch, length, heads, dim, **options)


def test_a_fused_call_may_have_additional_keys_and_values_or_none():
    query = heads_last()
    assert check_additional(None, None, query, query) is False
    assert check_additional(more(), more(), query, query) is True


def test_additional_keys_have_the_heads_of_keys_and_values_the_head_dim_of_values():
    key, value = heads_last(heads=2), heads_last(heads=2, dim=5)
    assert check_additional(more(heads=2), more(heads=2, dim=5), key, value) is True


@pytest.mark.parametrize(
    ("keys", "values", "missing", "given"),
    [
        (more(), None, "additional_values", "additional_keys"),
        (None, more(), "additional_keys", "additional_values"),
    ],
    ids=["keys alone", "values alone"],
)
def test_one_without_the_other_is_an_error(keys, values, missing, given):
    query = heads_last()
    with pytest.raises(ValueError, match=f"^{missing}: takes a tensor where {given} is given, got None$"):
        check_additional(keys, values, query, query)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 3}, r"batch \(dimension 0\) must be key's 2, got 3"),
        ({"heads": 2}, r"num_heads \(dimension 2\) must be key's 4, got 2"),
        ({"dim": 5}, r"head_dim \(dimension 3\) must be key's 8, got 5"),
        ({"dtype": torch.float64}, "must have key's dtype float32, got float64"),
        ({"device": "meta"}, "must be on key's device cpu, got meta"),
    ],
    ids=str,
)
def test_additional_keys_that_do_not_fit_are_refused(changed, message):
    query = heads_last()
    with pytest.raises(ConstraintError, match=f"^additional_keys: {message}"):
        check_additional(more(**changed), more(), query, query)


def test_additional_values_that_do_not_fit_are_refused():
    query = heads_last()
    with pytest.raises(ConstraintError, match=r"^additional_values: head_dim \(dimension 3\) must be value's 8, got 5"):
        check_additional(more(), more(dim=5), query, query)
    with pytest.raises(
        ConstraintError, match=r"^additional_values: length \(dimension 1\) must be additional_keys's 5, got 6"
    ):
        check_additional(more(), more(length=6), query, query)


def test_additional_keys_have_four_dimensions():
    query = heads_last()
    with pytest.raises(ConstraintError, match=r"^additional_keys: must be \[batch, length, num_heads, head_dim\]"):
        check_additional(query, query, query, query)


def test_additional_keys_are_a_plain_tensor():
    query = heads_last()
    with pytest.raises(TypeError, match="^additional_keys: takes a tensor, got float"):
        check_additional(1.0, more(), query, query)
    with pytest.raises(NotImplementedError, match="^additional_keys: takes plain tensors here, got a nested one"):
        check_additional(torch.nested.nested_tensor([torch.zeros(2, 2)]), more(), query, query)


# Unfused operands


def test_the_spatial_shape_of_unfused_operands_comes_back():
    assert check_heads_first(heads_first(), heads_first(), 2) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 3}, r"batch \(dimension 0\) must be query's 2, got 3"),
        ({"heads": 2}, r"num_heads \(dimension 1\) must be query's 4, got 2"),
        ({"height": 5}, r"height \(dimension 2\) must be query's 6, got 5"),
        ({"width": 5}, r"width \(dimension 3\) must be query's 7, got 5"),
        ({"dim": 5}, r"head_dim \(dimension 4\) must be query's 8, got 5"),
        ({"dtype": torch.float64}, "must have query's dtype float32, got float64"),
        ({"device": "meta"}, "must be on query's device cpu, got meta"),
    ],
    ids=str,
)
def test_an_unfused_key_that_does_not_fit_is_refused_by_dimension(changed, message):
    with pytest.raises(ConstraintError, match=f"^key: {message}"):
        check_heads_first(heads_first(), heads_first(**changed), 2)


def test_unfused_operands_have_one_dimension_for_each_axis():
    with pytest.raises(
        ConstraintError,
        match=r"^query: must be \[batch, num_heads, depth, height, width, head_dim\], 6 dimensions; got 5",
    ):
        check_heads_first(heads_first(), heads_first(), 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unfused_operands_may_be_of_four_dtypes(dtype):
    assert check_heads_first(heads_first(dtype=dtype), heads_first(dtype=dtype), 2) == (HEIGHT, WIDTH)


def test_an_unfused_operand_of_another_dtype_is_refused():
    with pytest.raises(ConstraintError, match="^query: dtype must be one of .*, got int64"):
        check_heads_first(heads_first(dtype=torch.int64), heads_first(dtype=torch.int64), 2)


def test_unfused_operands_are_tensors():
    with pytest.raises(InputTypeError, match="^key: takes a tensor, got NoneType"):
        check_heads_first(heads_first(), None, 2)


def test_additional_keys_of_an_unfused_call_fit_its_query():
    check_additional_heads_first("additional_keys", torch.zeros(BATCH, HEADS, 5, DIM), "query", heads_first())
    with pytest.raises(ValueError, match=r"^additional_keys: num_heads \(dimension 1\) must be query's 4, got 3"):
        check_additional_heads_first("additional_keys", torch.zeros(BATCH, 3, 5, DIM), "query", heads_first())
    with pytest.raises(ValueError, match=r"^additional_keys: batch \(dimension 0\) must be query's 2, got 1"):
        check_additional_heads_first("additional_keys", torch.zeros(1, HEADS, 5, DIM), "query", heads_first())
    with pytest.raises(ValueError, match=r"^additional_keys: head_dim \(dimension 3\) must be query's 8, got 9"):
        check_additional_heads_first("additional_keys", torch.zeros(BATCH, HEADS, 5, 9), "query", heads_first())
    with pytest.raises(ValueError, match=r"^additional_keys: must be \[batch, num_heads, tokens, head_dim\], 4 dim"):
        check_additional_heads_first("additional_keys", heads_first(), "query", heads_first())


def test_weights_are_as_many_as_a_window_has_keys_and_additional_tokens():
    assert check_weights(heads_first(dim=15), heads_first(), 2, (3, 5)) == (HEIGHT, WIDTH)
    tokens = torch.zeros(BATCH, HEADS, 4, DIM)
    assert check_weights(heads_first(dim=19), heads_first(), 2, (3, 5), tokens) == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"^attn: the last dimension must be 15 \(15 keys .* \(3, 5\)\), got 14"):
        check_weights(heads_first(dim=14), heads_first(), 2, (3, 5))
    with pytest.raises(
        ValueError, match=r"^attn: the last dimension must be 19 \(.* and 4 additional tokens\), got 15"
    ):
        check_weights(heads_first(dim=15), heads_first(), 2, (3, 5), tokens)
    with pytest.raises(ValueError, match=r"^attn: the last dimension must be 15 .*, got 19"):
        check_weights(heads_first(dim=19), heads_first(), 2, (3, 5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 3}, r"batch \(dimension 0\) must be attn's 2, got 3"),
        ({"heads": 2}, r"num_heads \(dimension 1\) must be attn's 4, got 2"),
        ({"height": 5}, r"height \(dimension 2\) must be attn's 6, got 5"),
        ({"width": 5}, r"width \(dimension 3\) must be attn's 7, got 5"),
        ({"dtype": torch.float64}, "must have attn's dtype float32, got float64"),
        ({"device": "meta"}, "must be on attn's device cpu, got meta"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_the_weights_is_refused(changed, message):
    with pytest.raises(ConstraintError, match=f"^value: {message}"):
        check_weights(heads_first(dim=9), heads_first(**changed), 2, (3, 3))


def test_additional_values_fit_the_value():
    with pytest.raises(ValueError, match=r"^additional_values: head_dim \(dimension 3\) must be value's 8, got 9"):
        check_weights(heads_first(dim=13), heads_first(), 2, (3, 3), torch.zeros(BATCH, HEADS, 4, 9))


# The relative positional bias


def test_a_bias_of_the_right_shape_is_taken_in_any_floating_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_rpb(torch.zeros(HEADS, 5, 9, dtype=dtype), HEADS, (3, 5), (False, False))


@pytest.mark.parametrize("is_causal", [(True, False), (False, True), (True, True)], ids=str)
def test_a_bias_beside_a_causal_axis_is_not_implemented(is_causal):
    with pytest.raises(NotImplementedError, match="^rpb: .*causal, got is_causal="):
        check_rpb(torch.zeros(HEADS, 5, 5), HEADS, (3, 3), is_causal)
    with pytest.raises(NotImplementedError, match="^rpb: .*causal, got is_causal="):
        check_rpb_is_possible((3, 3), is_causal)


def test_a_bias_needs_odd_kernel_sizes():
    with pytest.raises(ConstraintError, match="^rpb: .*odd kernel sizes, got kernel_size=4 on axis 1$"):
        check_rpb(torch.zeros(HEADS, 5, 7), HEADS, (3, 4), (False, False))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5, 9), r"dimension 0 \(num_heads\) must be 4, got 3 \(shape \[3, 5, 9\]\)"),
        ((4, 3, 9), r"dimension 1 \(2 \* kernel_size - 1 of axis 0\) must be 5, got 3"),
        ((4, 5, 5), r"dimension 2 \(2 \* kernel_size - 1 of axis 1\) must be 9, got 5"),
        ((4, 5), r"must be \[4, 5, 9\], got 2 dimensions"),
    ],
    ids=str,
)
def test_a_bias_of_another_shape_is_refused_by_dimension(shape, message):
    with pytest.raises(ConstraintError, match=f"^rpb: {message}"):
        check_rpb(torch.zeros(shape), HEADS, (3, 5), (False, False))


def test_a_bias_is_a_plain_floating_tensor():
    with pytest.raises(TypeError, match="^rpb: takes a tensor, got list$"):
        check_rpb([0.0], HEADS, (3,), (False,))
    with pytest.raises(TypeError, match="^rpb: must be floating, got torch.int64$"):
        check_rpb(torch.zeros(HEADS, 5, dtype=torch.int64), HEADS, (3,), (False,))
    with pytest.raises(ValueError, match="^rpb: takes a plain tensor, got a nested one$"):
        check_rpb(torch.nested.nested_tensor([torch.zeros(5)]), HEADS, (3,), (False,))


def test_a_bias_in_forward_mode_differentiation_is_refused():
    query, rpb = heads_first(), torch.zeros(HEADS, 5, 5)
    check_rpb_has_no_tangents(rpb, query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        assert has_tangents(query, dual)
        assert not has_tangents(query, rpb)
        check_rpb_has_no_tangents(None, dual)
        check_rpb_has_no_tangents(rpb, query)
        with pytest.raises(ValueError, match="^rpb: .*forward-mode"):
            check_rpb_has_no_tangents(rpb, dual)
        with pytest.raises(ValueError, match="^rpb: .*forward-mode"):
            check_rpb_has_no_tangents(forward_ad.make_dual(rpb, torch.ones_like(rpb)), query)
    assert not has_tangents(dual)


def test_tangents_of_functional_differentiation_are_seen_too():
    seen = []

    def look(query):
        seen.append(has_tangents(query))
        return query

    query = heads_first()
    torch.func.jvp(look, (query,), (torch.ones_like(query),))
    assert seen == [True]


# Under compile


def test_checks_are_traced_without_a_break():
    def checked(query, key, value, rpb):
        spatial = check_heads_last(query, key, value, 2)
        made = neighborhood(spatial, 3, stride=2, dilation=(1, 2), is_causal=False)
        check_rpb(rpb, HEADS, made.kernel_size, made.is_causal)
        return query * made.kernel_size[0]

    traced = torch.compile(checked, fullgraph=True, backend="eager")
    query = heads_last()
    assert traced(query, query, query, torch.zeros(HEADS, 5, 5)).shape == query.shape
