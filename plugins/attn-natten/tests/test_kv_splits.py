"""How many parts of keys and values the backward pass of fused attention has."""

from __future__ import annotations

import warnings
from math import prod

import pytest
import torch
from attn_natten import (
    NoEffectWarning,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_fused_na,
)
from attn_natten.errors import ConstraintError
from attn_natten.kv_splits import MAX_GRID, kv_splits, max_kv_splits
from attn_natten.switches.memory import get_memory_usage_preference
from hypothesis import given
from hypothesis import strategies as st

IMAGE = (56, 56)


def prefer(word):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        set_memory_usage_preference(word)


@pytest.fixture
def on():
    use_fused_na()


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("batch", "heads", "word", "expected"),
    [
        (1, 3, "default", (7, 7)),
        (1, 3, "strict", (7, 7)),
        (1, 3, "unrestricted", (7, 7)),
        (64, 12, "default", (2, 2)),
        (64, 12, "strict", (1, 1)),
        (64, 12, "unrestricted", (7, 7)),
    ],
)
def test_a_grid_of_56_by_56_is_split_as_natten_splits_it(batch, heads, word, expected):
    prefer(word)
    assert kv_splits(IMAGE, batch=batch, num_heads=heads) == expected


@pytest.mark.usefixtures("on")
def test_a_dilation_shortens_the_lines_and_multiplies_the_grid():
    assert kv_splits((56, 56), (8, 8), (2, 4), 1, 1) == (4, 2)  # ceil(28 / 8), ceil(14 / 8)
    assert kv_splits((57, 57), (8, 8), (8, 8), 1, 1) == (1, 1)
    # 4096 // (4 * 12 * 3 * 3) = 9 parts: the first axis gets min(9 // 2, 3), the second 9 // 3
    assert kv_splits((56, 56), (8, 8), (3, 3), 4, 12) == (3, 3)
    # 4096 // (16 * 12 * 2 * 2) = 5 parts: 5 // 2, then 5 // 2
    assert kv_splits((56, 56), (8, 8), (2, 2), 16, 12) == (2, 2)


@pytest.mark.usefixtures("on")
def test_a_line_gets_all_parts_that_are_allowed():
    assert kv_splits((4096,), batch=1, num_heads=1) == (64,)
    assert kv_splits((4096,), batch=32, num_heads=16) == (8,)
    prefer("strict")
    assert kv_splits((4096,), batch=32, num_heads=16) == (2,)


@pytest.mark.usefixtures("on")
def test_in_space_the_first_axis_gets_a_third_and_the_others_what_is_left():
    assert kv_splits((16, 16, 16)) == (4, 4, 4)
    # 4096 // 128 = 32 parts: min(32 // 3, 4), min(32 // 4, 4), 32 // 16
    assert kv_splits((16, 16, 16), batch=8, num_heads=16) == (4, 4, 2)
    # 4096 // 1024 = 4 parts: 4 // 3, 4 // 1, 4 // 4
    assert kv_splits((16, 16, 16), batch=64, num_heads=16) == (1, 4, 1)


def test_off_there_is_one_part():
    assert kv_splits(IMAGE) == (1, 1)
    use_fused_na(kv_parallel=False)
    assert kv_splits(IMAGE) == (1, 1)
    assert kv_splits((10, 10, 10)) == (1, 1, 1)


@pytest.mark.usefixtures("on")
def test_in_either_deterministic_mode_there_is_one_part_also_where_more_are_asked_for():
    assert kv_splits(IMAGE, asked=(4, 4)) == (4, 4)
    use_deterministic_algorithms()
    assert kv_splits(IMAGE) == (1, 1)
    assert kv_splits(IMAGE, asked=(4, 4)) == (1, 1)
    use_deterministic_algorithms(False)
    assert kv_splits(IMAGE) == (7, 7)
    torch.use_deterministic_algorithms(True)
    assert kv_splits(IMAGE) == (1, 1)
    assert kv_splits(IMAGE, asked=4) == (1, 1)


def test_what_is_asked_for_counts_whatever_the_switch_says_up_to_one_part_per_tile():
    assert kv_splits(IMAGE, asked=3) == (3, 3)
    assert kv_splits(IMAGE, asked=(3, 100)) == (3, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial": ()}, "^spatial: takes 1 to 3 axes, got 0"),
        ({"spatial": (4, 4, 4, 4)}, "^spatial: takes 1 to 3 axes, got 4"),
        ({"spatial": (0, 4)}, r"^spatial: must be >= 1, got \(0, 4\)"),
        ({"spatial": (4, 4), "kv_tile": 0}, "^kv_tile: must be >= 1, got 0"),
        ({"spatial": (4, 4), "dilation": (1, -1)}, r"^dilation: must be >= 1, got \(1, -1\)"),
        ({"spatial": (4, 4), "batch": 0}, "^batch: must be >= 1, got 0"),
        ({"spatial": (4, 4), "num_heads": -2}, "^num_heads: must be >= 1, got -2"),
        ({"spatial": (4, 4), "asked": 0}, "^asked: must be >= 1, got 0"),
    ],
    ids=str,
)
def test_numbers_are_at_least_1(arguments, message):
    with pytest.raises(ConstraintError, match=message):
        kv_splits(**arguments)


@pytest.mark.parametrize("name", ["kv_tile", "dilation", "asked"])
def test_there_is_one_number_for_each_axis(name):
    with pytest.raises(ValueError, match=f"^{name}: takes an int, or a tuple of 2 ints"):
        kv_splits((4, 4), **{name: (1, 1, 1)})


def axes(low, high, rank):
    return st.tuples(*[st.integers(low, high)] * rank)


@given(data=st.data(), rank=st.integers(1, 3), word=st.sampled_from(["default", "strict", "unrestricted"]))
def test_the_grid_stays_within_its_bound_and_every_part_has_a_tile(data, rank, word):
    spatial, tile, dilation = (data.draw(axes(1, high, rank)) for high in (300, 64, 8))
    batch, heads = data.draw(axes(1, 256, 2))
    use_fused_na()
    prefer(word)
    splits = kv_splits(spatial, tile, dilation, batch, heads)
    most = max_kv_splits(spatial, tile, dilation)
    allowed = max(1, MAX_GRID[get_memory_usage_preference()] // (batch * heads * prod(dilation)))
    assert all(1 <= each <= limit for each, limit in zip(splits, most))
    assert prod(splits) <= allowed
    if prod(most) <= allowed:
        assert splits == most
