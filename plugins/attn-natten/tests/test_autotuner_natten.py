"""NATTEN's kernels under the autotuner: the configurations that NATTEN lists, and how it is told, by a double of it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from enum import Enum
from importlib import import_module
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_core import InputError, Neighborhood, Problem
from attn_natten import library
from attn_natten.autotuner.families import FAMILIES
from attn_natten.autotuner.natten_tiles import OWN, NattenTiles, chosen_options

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import doubled

GRID = Neighborhood((56, 56), kernel_size=3).bind(3136, 3136)
PROBLEM = Problem(
    batch=1,
    seqlen_q=3136,
    seqlen_kv=3136,
    num_heads=3,
    num_kv_heads=3,
    head_dim=32,
    head_dim_v=32,
    dtype=torch.float16,
    device="cpu",
    bias=GRID,
    requires_grad=True,
)


class KernelSchedule(Enum):
    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


LISTED = {
    "get_configs_for_cutlass_fna": [((8, 8), (8, 8)), ((4, 16), (8, 8))],
    "get_bwd_configs_for_cutlass_fna": [((8, 8), (8, 8)), ((16, 8), (8, 16))],
    "get_configs_for_cutlass_hopper_fna": [
        (((8, 8), (8, 16)), KernelSchedule.NonPersistent),
        (((8, 16), (8, 16)), KernelSchedule.WarpSpecializedPingpong),
    ],
    "get_bwd_configs_for_cutlass_hopper_fna": [((8, 8), (8, 16))],
    "get_configs_for_cutlass_blackwell_fna": [((16, 16), (8, 16))],
    "get_bwd_configs_for_cutlass_blackwell_fna": [((16, 8), (16, 8))],
    "get_configs_for_flex_fna": [((8, 8), (8, 8))],
}


@pytest.fixture(autouse=True)
def asked(tmp_path):
    """The tensors that NATTEN was asked about."""
    tensors = []
    with doubled(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore", attn_natten.NoEffectWarning)
        for name, listed in LISTED.items():

            def finder(query, key, value, listed=listed):
                tensors.append((query, key, value))
                return listed

            setattr(library.NATTEN.module(), name, finder)
        yield tensors


def configurations(kernel, *, backward=False, thorough=False, problem=PROBLEM):
    return FAMILIES[kernel].configurations(problem, backward=backward, thorough=thorough)


def test_each_kernel_has_what_natten_lists_and_its_own_first(asked):
    assert configurations("natten/cutlass-fna") == [
        OWN,
        NattenTiles(q_tile=(8, 8), kv_tile=(8, 8)),
        NattenTiles(q_tile=(4, 16), kv_tile=(8, 8)),
    ]
    assert configurations("natten/hopper-fna") == [
        OWN,
        NattenTiles(q_tile=(8, 8), kv_tile=(8, 16), schedule="non"),
        NattenTiles(q_tile=(8, 16), kv_tile=(8, 16), schedule="pp"),
    ]
    assert configurations("natten/blackwell-fna", backward=True) == [OWN, NattenTiles(q_tile=(16, 8), kv_tile=(16, 8))]
    assert configurations("natten/flex-fna", backward=True) == [OWN]
    query, key, value = asked[0]
    assert query.shape[-2:] == key.shape[-2:] == value.shape[-2:] == (3, 32)
    assert query.ndim == 5
    assert query.dtype is torch.float16


def test_without_kv_parallelism_a_backward_is_not_split():
    assert configurations("natten/cutlass-fna", backward=True) == [
        OWN,
        NattenTiles(q_tile=(8, 8), kv_tile=(8, 8)),
        NattenTiles(q_tile=(16, 8), kv_tile=(8, 16)),
    ]


def test_with_kv_parallelism_one_part_and_the_most_are_tried():
    attn_natten.use_kv_parallelism_in_fused_na()
    found = configurations("natten/cutlass-fna", backward=True)
    assert [(each.kv_tile, each.kv_splits, each.use_pt_reduction) for each in found[1:]] == [
        ((8, 8), (1, 1), False),
        ((8, 8), (7, 7), False),
        ((8, 16), (1, 1), False),
        ((8, 16), (7, 4), False),
    ]
    attn_natten.set_memory_usage_preference("strict")
    many = configurations("natten/cutlass-fna", backward=True, problem=replace(PROBLEM, batch=64, num_heads=12))
    assert {each.kv_splits for each in many[1:]} == {(1, 1)}


def test_thorough_tries_every_number_of_parts_and_both_reductions():
    attn_natten.use_kv_parallelism_in_fused_na()
    found = configurations("natten/cutlass-fna", backward=True, thorough=True)
    assert len(found) == 1 + 2 * 7 * 7 + 2 * 7 * 4
    assert NattenTiles(q_tile=(8, 8), kv_tile=(8, 8), kv_splits=(3, 5), use_pt_reduction=True) in found


def test_a_gpu_that_is_not_there_has_no_configurations_but_the_kernels_own(asked):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert configurations("natten/cutlass-fna", problem=replace(PROBLEM, device="cuda")) == [OWN]
    assert not asked


def test_within_a_configuration_natten_is_told_and_only_there(monkeypatch):
    fna = import_module("attn_natten.kernels.run_fna")
    told = []
    monkeypatch.setattr(
        fna, "_FUNCTIONS", dict.fromkeys((1, 2, 3), lambda **arguments: told.append(arguments) or arguments["query"])
    )
    x = [torch.empty(1, 3136, 3, 32)] * 3
    forward = NattenTiles(q_tile=(8, 16), kv_tile=(8, 16), schedule="coop")
    backward = NattenTiles(q_tile=(16, 8), kv_tile=(8, 8), kv_splits=(2, 3), use_pt_reduction=False)
    with FAMILIES["natten/hopper-fna"].within(forward, backward):
        fna.hopper(*x, bias=GRID, scale=1.0)
    with FAMILIES["natten/hopper-fna"].within(None, NattenTiles(q_tile=(16, 8), kv_tile=(8, 8))):
        fna.hopper(*x, bias=GRID, scale=1.0)
    fna.hopper(*x, bias=GRID, scale=1.0)
    first, second, third = (
        {name: value for name, value in each.items() if "tile" in name or "backward" in name or "schedule" in name}
        for each in told
    )
    assert first == {
        "q_tile_shape": (8, 16),
        "kv_tile_shape": (8, 16),
        "kernel_schedule": "coop",
        "backward_q_tile_shape": (16, 8),
        "backward_kv_tile_shape": (8, 8),
        "backward_kv_splits": (2, 3),
        "backward_use_pt_reduction": False,
    }
    assert second == {"backward_q_tile_shape": (16, 8), "backward_kv_tile_shape": (8, 8)}
    assert third == chosen_options() == {}


def test_what_an_inner_scope_leaves_open_stays_as_the_outer_one_says():
    family = FAMILIES["natten/cutlass-fna"]
    with family.within(NattenTiles(q_tile=(8, 8), kv_tile=(8, 8)), NattenTiles(kv_splits=(2, 2))):
        with family.within(NattenTiles(q_tile=(4, 16), kv_tile=(8, 8)), None):
            assert chosen_options() == {
                "q_tile_shape": (4, 16),
                "kv_tile_shape": (8, 8),
                "backward_kv_splits": (2, 2),
            }
        assert chosen_options()["q_tile_shape"] == (8, 8)
    assert chosen_options() == {}


def test_a_configuration_is_written_and_read():
    family = FAMILIES["natten/cutlass-fna"]
    tiles = NattenTiles(q_tile=(8, 8), kv_tile=(8, 16), kv_splits=(2, 1), use_pt_reduction=True)
    assert (
        family.read({name: list(v) if isinstance(v, tuple) else v for name, v in family.written(tiles).items()})
        == tiles
    )
    assert family.written(OWN) == {}
    with pytest.raises(InputError, match="tiles of natten/cutlass-fna: takes q_tile, .*, got 'box'"):
        family.read({"box": [8]})
    with pytest.raises(InputError, match=r"kv_tile takes ints >= 1, got \[0\]"):
        family.read({"kv_tile": [0]})


def test_words_of_the_command_line_are_taken_together():
    family = FAMILIES["natten/hopper-fna"]
    words = {"q_tile": (8, 8), "kv_tile": (8, 16), "schedule": "pp"}
    assert family.from_words(words) == NattenTiles(q_tile=(8, 8), kv_tile=(8, 16), schedule="pp")
    with pytest.raises(InputError, match="takes q_tile and kv_tile together, got q_tile"):
        family.from_words({"q_tile": (8, 8)})
    with pytest.raises(InputError, match="has no schedule, got 'pp'"):
        FAMILIES["natten/cutlass-fna"].from_words(words)
