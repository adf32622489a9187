"""NATTEN's constraints, by every public operation of 1, 2 and 3 axes: which error, and that it is one of Python's.

NATTEN's own code ended the process for a device or a dtype that it did not know; here, nothing does.
"""

from __future__ import annotations

import attn_natten
import pytest
import torch
from attn_core import AttnError
from attn_natten.arguments import SPATIAL

LENGTH, HEADS, DIM, KERNEL = 7, 2, 8, 3


def fused(rank, *, length=LENGTH, dtype=torch.float32, **parameters):
    operand = torch.zeros(1, *(length,) * rank, HEADS, DIM, dtype=dtype)
    return getattr(attn_natten, f"na{rank}d")(operand, operand, operand, **{"kernel_size": KERNEL} | parameters)


def qk(rank, *, length=LENGTH, dtype=torch.float32, **parameters):
    operand = torch.zeros(1, HEADS, *(length,) * rank, DIM, dtype=dtype)
    return getattr(attn_natten, f"na{rank}d_qk")(operand, operand, **{"kernel_size": KERNEL} | parameters)


def av(rank, *, length=LENGTH, dtype=torch.float32, **parameters):
    spatial, kernel = (length,) * rank, parameters.get("kernel_size", KERNEL)
    width = abs(kernel) ** rank if type(kernel) is int else KERNEL**rank
    attn, value = (torch.zeros(1, HEADS, *spatial, size, dtype=dtype) for size in (width, DIM))
    return getattr(attn_natten, f"na{rank}d_av")(attn, value, **{"kernel_size": KERNEL} | parameters)


each_operation = pytest.mark.parametrize("operation", [fused, qk, av])
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)


@each_rank
@each_operation
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel_size": 1}, "^kernel_size: kernel size must be greater than 1 on each axis, got 1 on axis 0"),
        ({"kernel_size": 0}, "^kernel_size: kernel size must be greater than 1 on each axis, got 0"),
        ({"kernel_size": -3}, "^kernel_size: kernel size must be greater than 1 on each axis, got -3"),
        ({"dilation": 0}, "^dilation: must be an int >= 1, got 0"),
        ({"dilation": -1}, "^dilation: must be an int >= 1, got -1"),
        ({"kernel_size": 9}, r"\(axis 0\) is 7, with kernel_size=9 \* dilation=1 = 9$"),
        ({"dilation": 3}, r"\(axis 0\) is 7, with kernel_size=3 \* dilation=3 = 9$"),
        ({"dtype": torch.int64}, "dtype must be one of float64, float32, float16, bfloat16, got int64"),
    ],
    ids=str,
)
def test_a_constraint_that_is_not_met_is_a_runtime_error_and_a_value_error(operation, rank, given, message):
    with pytest.raises(RuntimeError, match=message) as error:
        operation(rank, **given)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, AttnError)


@each_rank
@each_operation
@pytest.mark.parametrize("name", ["kernel_size", "dilation", "is_causal"])
@pytest.mark.parametrize("value", [1.5, "3", (3, 3, 3, 3), {3}], ids=repr)
def test_a_parameter_of_another_type_or_length_is_a_value_error(operation, rank, name, value):
    with pytest.raises(ValueError, match=f"^{name}: takes .*; got ") as error:
        operation(rank, **{name: value})
    assert str(error.value).endswith(repr(value))


@each_rank
@each_operation
def test_a_bool_is_no_kernel_size_and_a_number_no_bool(operation, rank):
    with pytest.raises(ValueError, match="^kernel_size: takes an int.*got True$"):
        operation(rank, kernel_size=True)
    with pytest.raises(ValueError, match="^dilation: takes an int.*got True$"):
        operation(rank, dilation=True)
    with pytest.raises(ValueError, match="^is_causal: takes True or False.*got 1$"):
        operation(rank, is_causal=1)


@each_rank
@each_operation
def test_none_is_no_dilation_and_not_causal(operation, rank):
    torch.testing.assert_close(operation(rank, dilation=None, is_causal=None), operation(rank))


@each_rank
@each_operation
def test_even_kernel_sizes_are_taken_unless_checks_are_strict(operation, rank):
    assert operation(rank, kernel_size=4) is not None
    attn_natten.use_strict_checks()
    with pytest.raises(RuntimeError, match="^kernel_size: .*odd number greater than 1, got 4 on axis 0"):
        operation(rank, kernel_size=4)


@each_rank
@each_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_process_lives_on_with_every_dtype_on_the_cpu(operation, rank, dtype):
    assert operation(rank, dtype=dtype).dtype is dtype


@each_rank
@pytest.mark.parametrize("name", ["key", "value"])
def test_fused_operands_that_differ_are_refused_by_dimension(rank, name):
    for dim, called in enumerate(["batch", *SPATIAL[rank], "num_heads", "head_dim"]):
        if (name, called) == ("value", "head_dim"):  # which may differ
            continue
        shape = [2, *(LENGTH,) * rank, HEADS, DIM]
        operands = {each: torch.zeros(shape) for each in ("query", "key", "value")}
        shape[dim] += 1
        operands[name] = torch.zeros(shape)
        with pytest.raises(RuntimeError, match=f"^{name}: {called} .*must .*{operands['query'].shape[dim]}.*, got "):
            getattr(attn_natten, f"na{rank}d")(**operands, kernel_size=KERNEL)


@each_rank
def test_unfused_operands_that_differ_are_refused_by_dimension(rank):
    for dim, called in enumerate(["batch", "num_heads", *SPATIAL[rank], "head_dim"]):
        shape = [2, HEADS, *(LENGTH,) * rank, DIM]
        query = torch.zeros(shape)
        attn = torch.zeros(*shape[:-1], KERNEL**rank)
        shape[dim] += 1
        other = torch.zeros(shape)
        with pytest.raises(RuntimeError, match=rf"^key: {called} \(dimension {dim}\) must be query's "):
            getattr(attn_natten, f"na{rank}d_qk")(query, other, KERNEL)
        if called != "head_dim":
            with pytest.raises(RuntimeError, match=rf"^value: {called} \(dimension {dim}\) must be attn's "):
                getattr(attn_natten, f"na{rank}d_av")(attn, other, KERNEL)


@each_rank
def test_operands_of_another_rank_are_refused_with_the_names_of_their_dimensions(rank):
    operand = torch.zeros(2, 2, 2)
    spatial = ", ".join(SPATIAL[rank])
    with pytest.raises(RuntimeError, match=rf"^query: must be \[batch, {spatial}, num_heads, head_dim\], .*; got 3"):
        getattr(attn_natten, f"na{rank}d")(operand, operand, operand, KERNEL)
    with pytest.raises(RuntimeError, match=rf"^query: must be \[batch, num_heads, {spatial}, head_dim\], .*; got 3"):
        getattr(attn_natten, f"na{rank}d_qk")(operand, operand, KERNEL)
    with pytest.raises(RuntimeError, match=rf"^attn: must be \[batch, num_heads, {spatial}, width\], .*; got 3"):
        getattr(attn_natten, f"na{rank}d_av")(operand, operand, KERNEL)


@each_rank
def test_operands_of_two_dtypes_or_devices_are_refused(rank):
    last = torch.zeros(1, *(LENGTH,) * rank, HEADS, DIM)
    first = torch.zeros(1, HEADS, *(LENGTH,) * rank, DIM)
    for changed, message in ((torch.float64, "dtype float32, got float64"), ("meta", "device cpu, got meta")):
        with pytest.raises(RuntimeError, match=f"^value: must .* query's {message}"):
            getattr(attn_natten, f"na{rank}d")(last, last, last.to(changed), KERNEL)
        with pytest.raises(RuntimeError, match=f"^key: must .* query's {message}"):
            getattr(attn_natten, f"na{rank}d_qk")(first, first.to(changed), KERNEL)


@each_rank
def test_head_dims_and_dtypes_of_fused_operands_are_free_unless_checks_are_strict(rank):
    narrow, double = (torch.zeros(1, *(LENGTH,) * rank, HEADS, 6, dtype=t) for t in (torch.float32, torch.float64))
    function = getattr(attn_natten, f"na{rank}d")
    for operand in (narrow, double):
        assert function(operand, operand, operand, KERNEL).shape == operand.shape
    attn_natten.use_strict_checks()
    with pytest.raises(RuntimeError, match="^query: head_dim must be a multiple of 4 for float32 .*, got 6"):
        function(narrow, narrow, narrow, KERNEL)
    with pytest.raises(RuntimeError, match="^query: dtype must be one of float32, float16, bfloat16 .*, got float64"):
        function(double, double, double, KERNEL)


@each_rank
def test_nested_fused_operands_are_not_implemented(rank):
    nested = torch.nested.nested_tensor([torch.zeros(*(LENGTH,) * rank, HEADS, DIM)] * 2, layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="^query: takes plain tensors here, got a nested one$"):
        getattr(attn_natten, f"na{rank}d")(nested, nested, nested, KERNEL)


@each_rank
def test_a_fused_call_in_forward_mode_is_not_implemented(rank):
    operand = torch.zeros(1, *(LENGTH,) * rank, HEADS, DIM)
    function = getattr(attn_natten, f"na{rank}d")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda query: function(query, operand, operand, KERNEL), (operand,), (operand,))


@each_rank
def test_a_bias_beside_a_causal_axis_is_not_implemented(rank):
    rpb = torch.zeros(HEADS, *(2 * KERNEL - 1,) * rank)
    causal = (True,) + (False,) * (rank - 1)
    for operation in (fused, qk):
        with pytest.raises(NotImplementedError, match="^rpb: "):
            operation(rank, rpb=rpb, is_causal=causal)
    with pytest.raises(NotImplementedError, match="^rpb: "):
        getattr(attn_natten, f"NeighborhoodAttention{rank}D")(
            embed_dim=8, num_heads=2, kernel_size=KERNEL, rel_pos_bias=True, is_causal=causal
        )


@each_rank
def test_a_bias_needs_odd_kernel_sizes_and_its_shape_names_the_dimension(rank):
    for operation in (fused, qk):
        with pytest.raises(RuntimeError, match="^rpb: .*odd kernel sizes, got kernel_size=4 on axis 0"):
            operation(rank, kernel_size=4, rpb=torch.zeros(HEADS, *(7,) * rank))
        with pytest.raises(RuntimeError, match=r"^rpb: dimension 1 .* must be 5, got 3 \(shape "):
            operation(rank, rpb=torch.zeros(HEADS, *(3,) * rank))
        with pytest.raises(RuntimeError, match=r"^rpb: dimension 0 \(num_heads\) must be 2, got 3"):
            operation(rank, rpb=torch.zeros(HEADS + 1, *(5,) * rank))


@each_rank
def test_a_bias_in_forward_mode_is_a_value_error(rank):
    query, rpb = torch.zeros(1, HEADS, *(LENGTH,) * rank, DIM), torch.zeros(HEADS, *(5,) * rank)
    function = getattr(attn_natten, f"na{rank}d_qk")
    with pytest.raises(ValueError, match="^rpb: .*forward-mode"):
        torch.func.jvp(lambda key: function(query, key, KERNEL, rpb=rpb), (query,), (query,))


@each_rank
def test_additional_keys_without_values_are_an_error_of_a_fused_call(rank):
    tokens = torch.zeros(1, 4, HEADS, DIM)
    with pytest.raises(ValueError, match="^additional_values: takes a tensor where additional_keys is given, got None"):
        fused(rank, additional_keys=tokens)
    with pytest.raises(ValueError, match="^additional_keys: takes a tensor where additional_values is given, got None"):
        fused(rank, additional_values=tokens)


@each_rank
def test_additional_tokens_of_an_unfused_call_fit_its_operands(rank):
    with pytest.raises(ValueError, match=r"^additional_keys: num_heads \(dimension 1\) must be query's 2, got 3"):
        qk(rank, additional_keys=torch.zeros(1, 3, 4, DIM))
    with pytest.raises(
        ValueError, match=rf"^attn: the last dimension must be {KERNEL**rank + 4} .*, got {KERNEL**rank}"
    ):
        av(rank, additional_values=torch.zeros(1, HEADS, 4, DIM))
