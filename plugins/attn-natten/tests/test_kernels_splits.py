"""KV parallelism reaches NATTEN's kernels: what the switches say is what they are told, with a double of NATTEN.

With a real one, the number of parts is compared with its own.
"""

from __future__ import annotations

import random
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_core import Causal, Neighborhood
from attn_natten import library
from attn_natten.kv_splits import kv_splits

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import doubled

GRID = Neighborhood((56, 56), kernel_size=3, dilation=(1, 2)).bind(3136, 3136)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """(run_fna, run_fmha, what NATTEN was told last, by keyword)."""
    with doubled(tmp_path):
        fna, fmha = (import_module(f"attn_natten.kernels.run_{name}") for name in ("fna", "fmha"))
        last = {}

        def grid(**arguments):
            last.clear()
            last.update(arguments)
            return arguments["query"]

        monkeypatch.setattr(fna, "_FUNCTIONS", dict.fromkeys((1, 2, 3), grid))
        monkeypatch.setattr(fmha, "_attention", grid)
        yield fna, fmha, last


@pytest.fixture(autouse=True)
def _quiet():
    """That nothing splits on this machine is of no concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attn_natten.NoEffectWarning)
        yield


def operands(batch=64, seqlen=3136, heads=12):
    return [torch.empty(batch, seqlen, heads, 1)] * 3


def splits_of(told, family="cutlass", bias=GRID, batch=64):
    fna, _, last = told
    getattr(fna, family)(*operands(batch), bias=bias, scale=1.0)
    return last.get("backward_kv_splits"), last["attention_kwargs"].get("backward_kv_splits")


def test_until_a_switch_is_thrown_natten_keeps_its_own_default(told):
    assert splits_of(told) == (None, None)
    _, fmha, last = told
    fmha.cutlass(*operands(), bias=Causal("top-left").bind(3136, 3136), scale=1.0)
    assert "backward_kv_splits" not in last


def test_on_natten_is_told_the_parts_that_memory_allows(told):
    attn_natten.use_kv_parallelism_in_fused_na()
    assert splits_of(told) == ((1, 2), 5)  # 4096 // (64 * 12 * 2) = 2 parts; of 49 tiles, 4096 // (64 * 12)
    assert splits_of(told, batch=1) == ((7, 4), 49)
    attn_natten.set_memory_usage_preference("strict")
    assert splits_of(told) == ((1, 1), 1)
    attn_natten.set_memory_usage_preference("unrestricted")
    assert splits_of(told) == ((7, 4), 49)


def test_off_natten_is_told_one_part(told):
    attn_natten.use_fused_na(False)
    assert splits_of(told) == ((1, 1), 1)


def test_in_the_deterministic_mode_of_this_package_natten_is_told_one_part(told):
    attn_natten.use_deterministic_algorithms()
    assert splits_of(told) == ((1, 1), 1)


def test_a_mode_that_begins_later_overrules_the_switch(told):
    attn_natten.use_fused_na()
    assert splits_of(told, batch=1) == ((7, 4), 49)
    attn_natten.use_deterministic_algorithms()
    assert splits_of(told, batch=1) == ((1, 1), 1)


@pytest.mark.parametrize("family", ["hopper", "blackwell", "flex"])
def test_kernels_that_do_not_split_are_told_nothing(told, family):
    attn_natten.use_fused_na()
    assert splits_of(told, family) == (None, None)


def test_dense_attention_is_told_a_number(told):
    attn_natten.use_fused_na()
    _, fmha, last = told
    fmha.cutlass(*operands(batch=1), scale=1.0)
    assert last["backward_kv_splits"] == 49
    fmha.hopper(*operands(batch=1), scale=1.0)
    assert "backward_kv_splits" not in last


@pytest.mark.parametrize("seed", [20261121], ids="seed {}".format)
def test_parts_are_those_of_a_real_natten(seed):
    if find_spec("natten") is None or not library.NATTEN.is_supported(library.NATTEN.distributed() or ""):
        pytest.skip("NATTEN 0.21 is not installed: nox -s natten")
    natten = library.NATTEN.module()
    theirs = import_module("natten.backends.configs.cutlass.backward_knobs")
    attn_natten.use_fused_na()
    rng = random.Random(seed)
    for _ in range(1000):
        rank = rng.randint(1, 3)
        spatial = tuple(rng.randint(1, (5000, 150, 40)[rank - 1]) for _ in range(rank))
        dilation, asked = (tuple(rng.randint(1, high) for _ in range(rank)) for high in (4, 9))
        tile = tuple(rng.choice([1, 4, 8, 16, 64]) for _ in range(rank))
        batch, heads = rng.randint(1, 64), rng.randint(1, 16)
        word = rng.choice(["default", "strict", "unrestricted"])
        attn_natten.set_memory_usage_preference(word)
        natten.set_memory_usage_preference(word)
        query = torch.empty(batch, *spatial, heads, 8, device="meta")
        problem = (spatial, tile, dilation, batch, heads)
        default = theirs.get_default_kv_splits_backward(query, tile, deterministic=False, dilation=dilation)
        assert kv_splits(*problem) == default, (problem, word)
        limited = theirs.check_fna_kv_splits(asked, query, tile, deterministic=False, dilation=dilation)
        assert kv_splits(*problem, asked=asked) == limited, (problem, asked)
    natten.set_memory_usage_preference("default")
