"""The oracle of these tests is right: by hand, by formulas of other forms, and by the core's own rule."""

import sys
from pathlib import Path

import pytest
import torch
from attn_core import Neighborhood

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import oracle

AXES = [
    (length, kernel, dilation, causal)
    for length in range(1, 14)
    for kernel in range(1, length + 1)
    for dilation in range(1, length // kernel + 1)
    for causal in (False, True)
]


def test_windows_are_those_written_by_hand():
    assert oracle.neighbors(7, 3)[0] == [0, 1, 2]
    assert oracle.neighbors(7, 3)[6] == [4, 5, 6]
    assert [oracle.neighbors(8, 4)[i] for i in (0, 3, 7)] == [[0, 1, 2, 3], [1, 2, 3, 4], [4, 5, 6, 7]]
    assert oracle.neighbors(7, 3, dilation=2)[3] == [1, 3, 5]
    assert oracle.neighbors(7, 3, dilation=2)[6] == [2, 4, 6]
    assert oracle.neighbors(7, 3, dilation=2, causal=True)[2] == [0, 2]
    assert oracle.neighbors(10, 4, stride=2)[5] == [3, 4, 5, 6]
    assert oracle.neighbors(12, 4, stride=4, causal=True)[5] == [4, 5]


def test_slots_have_the_first_axis_slowest_and_masked_ones_last():
    assert oracle.slots((3, 4), (2, 3))[0].tolist() == [0, 1, 2, 4, 5, 6]
    assert oracle.slots((7,), 3, dilation=2, causal=True)[2].tolist() == [0, 2, oracle.MASKED]
    assert oracle.slots((2, 3), 2, causal=(True, False))[1].tolist() == [0, 1, oracle.MASKED, oracle.MASKED]


def test_every_query_sees_itself_and_no_more_keys_than_the_kernel_has():
    for length, kernel, dilation, causal in AXES:
        for i, keys in enumerate(oracle.neighbors(length, kernel, dilation, causal=causal)):
            assert i in keys
            assert len(keys) == (min(kernel, i // dilation + 1) if causal else kernel)


def test_the_queries_of_a_key_are_those_of_the_inverse_formula():
    for length, kernel, dilation, causal in AXES:
        if kernel % 2 == 0 or kernel == 1:
            continue
        seen = oracle.neighbors(length, kernel, dilation, causal=causal)
        for j in range(length):
            if causal:
                expected = range(j, min(j + kernel * dilation, length), dilation)
            else:
                radius, reach = kernel // 2, kernel * dilation
                first = j % dilation if j < reach else j - radius * dilation
                expected = range(first, length if j >= length - reach else j + (radius + 1) * dilation, dilation)
            assert [i for i, keys in enumerate(seen) if j in keys] == list(expected), (length, kernel, dilation, causal)


def test_it_agrees_with_the_core_for_every_small_axis_and_stride():
    for length, kernel, dilation, causal in AXES:
        for stride in range(1, kernel + 1):
            bias = Neighborhood(length, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal)
            kept = bias.bind(length, length).materialize("cpu").reshape(length, length)
            seen = oracle.neighbors(length, kernel, dilation, stride, causal)
            assert [row.nonzero().flatten().tolist() for row in kept] == seen, (
                length,
                kernel,
                dilation,
                stride,
                causal,
            )


@pytest.mark.parametrize("causal", [False, True])
def test_with_a_kernel_of_the_whole_axis_it_is_torchs_attention(causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    out, _ = oracle.attention(query, key, value, 7, causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(out, expected)
