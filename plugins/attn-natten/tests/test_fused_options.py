"""Options of NATTEN's kernels in fused calls: told to the kernel that is named, or said to have no effect."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import wraps
from pathlib import Path

import pytest
import torch
from attn_core.errors import InputError, InputTypeError
from attn_natten import na1d, na2d, use_kv_parallelism_in_fused_na
from attn_natten.errors import NoEffectWarning

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import doubled, registered

TILES = {
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 4),
    "backward_q_tile_shape": (4, 8),
    "backward_kv_tile_shape": (4, 4),
    "backward_kv_splits": (2, 1),
    "backward_use_pt_reduction": True,
    "kernel_schedule": "coop",
}
NOBODYS = {"xformers_kwargs": {}, "run_persistent_kernel": False, "torch_compile": True}


def operands(*extents, dim=8):
    generator = torch.Generator().manual_seed(20261121)
    return tuple(torch.randn(2, *extents, 2, dim, generator=generator) for _ in range(3))


@pytest.fixture
def told(tmp_path):
    """What NATTEN's na2d is told in each call: a double of NATTEN, its kernels declared for the CPU."""
    calls = []
    with doubled(tmp_path), registered() as double:
        na2d_of_natten = double.na2d

        @wraps(na2d_of_natten)
        def noting(**arguments):
            calls.append(arguments)
            return na2d_of_natten(**arguments)

        double.na2d = noting
        yield calls


def test_every_option_is_taken_and_said_to_have_no_effect_once():
    given = operands(6, 5)
    options = TILES | NOBODYS
    with pytest.warns(NoEffectWarning) as said:
        got = na2d(*given, 3, **options)
    assert sorted(str(each.message).split()[1] for each in said) == sorted(options)
    assert {each.filename for each in said} == {__file__}
    torch.testing.assert_close(got, na2d(*given, 3), atol=0, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        na2d(*given, 3, **options)
    with pytest.warns(NoEffectWarning, match="na1d: q_tile_shape.*backend= may name one of NATTEN's"):
        na1d(*operands(6), 3, q_tile_shape=64)


@pytest.mark.filterwarnings("error::attn_natten.errors.NoEffectWarning")
def test_a_kernel_of_natten_that_is_named_is_told_what_it_takes(told):
    given = operands(16, 16, dim=32)
    got = na2d(*given, 3, backend="cutlass-fna", **TILES)
    torch.testing.assert_close(got, na2d(*given, 3, backend="torch/reference"), atol=1e-5, rtol=1e-5)
    na2d(*given, 3, backend="cutlass-fna")
    first, second = told
    assert first["backend"] == "cutlass-fna"
    assert {name: first[name] for name in TILES} == TILES
    assert not set(TILES) & set(second)


def test_what_no_kernel_takes_is_said_beside_a_kernel_of_natten_too(told):
    with pytest.warns(NoEffectWarning) as said:
        na2d(*operands(16, 16, dim=32), 3, backend="cutlass-fna", **NOBODYS)
    assert sorted(str(each.message).split()[1] for each in said) == sorted(NOBODYS)


@pytest.mark.parametrize("why", ["torch-deterministic", "kv-parallelism-off"])
def test_keys_are_one_part_where_they_may_not_be_split(told, why, caplog):
    if why == "torch-deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        use_kv_parallelism_in_fused_na(False)
    with caplog.at_level(logging.WARNING, "attn_natten"):
        na2d(*operands(16, 16, dim=32), 3, backend="cutlass-fna", backward_kv_splits=(4, 2))
    assert told[0]["backward_kv_splits"] == (1, 1)
    assert "na2d: backward_kv_splits is 1 on each axis, not (4, 2)" in caplog.text


BAD = {
    "schedule": ({"kernel_schedule": "fast"}, InputError, "kernel_schedule: takes one of 'non', 'coop', 'pp', or None"),
    "tile-of-three-axes": ({"q_tile_shape": (8, 8, 8)}, InputError, "q_tile_shape: takes an int, or a tuple of 2 ints"),
    "tile-of-none": ({"q_tile_shape": (8, 0)}, InputError, "q_tile_shape: must be at least 1 on each axis"),
    "splits": ({"backward_kv_splits": "all"}, InputError, "backward_kv_splits: takes an int"),
    "persistent": ({"run_persistent_kernel": "no"}, InputError, "run_persistent_kernel: takes True or False, got 'no'"),
    "xformers": ({"xformers_kwargs": 3}, InputTypeError, "xformers_kwargs: takes a dict or None, got int"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("backend", [None, "cutlass-fna"], ids=["any-kernel", "natten"])
def test_an_option_that_cannot_be_is_an_error_that_names_it(options, error, match, backend):
    with pytest.raises(error, match=match):
        na2d(*operands(6, 5), 3, backend=backend, **options)
