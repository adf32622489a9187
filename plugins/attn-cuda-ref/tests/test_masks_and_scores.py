"""The text's masks and scores beside those of the core, pair by pair and tile by tile, in the emulator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core import AttnBias, BlockMask, KeyPadding, MaskMod, ScoreMod
from attn_cuda_ref.constants import arguments, constants
from attn_cuda_ref.translate import strangers, translated

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from biases_to_try import BATCH, HEADS, LENGTHS, grids, masks, scores
from emu.emulator import EmulatedLauncher
from emu.toolchain import missing_tool

if missing_tool():
    pytest.skip(f"the emulator cannot be built: {missing_tool()}", allow_module_level=True)

CPU = torch.device("cpu")
EMPTY, FULL, MIXED = range(3)

#: Answers every question about every pair, and about every tile of rows x columns; a block has one head.
ASK = """
#include "scores.cuh"
extern "C" __global__ void __launch_bounds__(128)
    ask(unsigned char* keep, unsigned char* exist, int* keys, int* queries, unsigned char* kinds, float* added,
        long long num_heads, long long seqlen_q, long long seqlen_kv, long long rows,
        long long columns BIAS_PARAMETERS) {
  const MASK mask{MASK_ARGUMENTS};
  const SCORE score{SCORE_ARGUMENTS};
  const Where w{(int)(blockIdx.x / num_heads), (int)(blockIdx.x % num_heads)};
  const int tiles_q = (int)((seqlen_q + rows - 1) / rows), tiles_kv = (int)((seqlen_kv + columns - 1) / columns);
  for (int i = threadIdx.x; i < seqlen_q * seqlen_kv; i += 128) {
    const int q = (int)(i / seqlen_kv), k = (int)(i % seqlen_kv);
    keep[blockIdx.x * seqlen_q * seqlen_kv + i] = mask.keep(w, q, k);
    added[blockIdx.x * seqlen_q * seqlen_kv + i] = score.added(w, q, k);
  }
  if (w.h == 0)
    for (int k = threadIdx.x; k < seqlen_kv; k += 128) exist[w.b * seqlen_kv + k] = mask.exists(w.b, k);
  for (int i = threadIdx.x; i < tiles_q * tiles_kv; i += 128) {
    const int q0 = i / tiles_kv * (int)rows, q1 = min(q0 + (int)rows, (int)seqlen_q);
    const int k0 = i % tiles_kv * (int)columns, k1 = min(k0 + (int)columns, (int)seqlen_kv);
    kinds[blockIdx.x * tiles_q * tiles_kv + i] = (unsigned char)mask.tile(w, q0, q1, k0, k1);
    const Span of_queries = mask.keys(w, q0, q1, (int)seqlen_kv), of_keys = mask.queries(w, k0, k1, (int)seqlen_q);
    int* of_row = keys + (blockIdx.x * tiles_q + i / tiles_kv) * 2;
    int* of_column = queries + (blockIdx.x * tiles_kv + i % tiles_kv) * 2;
    if (i % tiles_kv == 0) of_row[0] = of_queries.low, of_row[1] = of_queries.high;
    if (i / tiles_kv == 0) of_column[0] = of_keys.low, of_column[1] = of_keys.high;
  }
}
"""


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


def ask(launcher: EmulatedLauncher, bias: AttnBias, rows: int, columns: int) -> dict[str, torch.Tensor]:
    seqlen_q, seqlen_kv = bias.bound_lengths()
    tiles_q, tiles_kv = -(-seqlen_q // rows), -(-seqlen_kv // columns)
    told = {
        "keep": torch.full((BATCH, HEADS, seqlen_q, seqlen_kv), 9, dtype=torch.uint8),
        "exist": torch.full((BATCH, seqlen_kv), 9, dtype=torch.uint8),
        "keys": torch.full((BATCH, HEADS, tiles_q, 2), -9, dtype=torch.int32),
        "queries": torch.full((BATCH, HEADS, tiles_kv, 2), -9, dtype=torch.int32),
        "kinds": torch.full((BATCH, HEADS, tiles_q, tiles_kv), 9, dtype=torch.uint8),
        "added": torch.full((BATCH, HEADS, seqlen_q, seqlen_kv), float("nan")),
    }
    written = translated(bias, CPU)
    function = launcher.compile(ASK, "ask", constants(torch.float32, 8, 8, written, False))
    sizes = [HEADS, seqlen_q, seqlen_kv, rows, columns]
    function.launch((BATCH * HEADS, 1, 1), (128, 1, 1), 0, [*told.values(), *sizes, *arguments(written)])
    return told


EVERY_MASK = [bias for lengths in LENGTHS for bias in masks(*lengths)] + grids()


@pytest.mark.parametrize("bias", EVERY_MASK, ids=repr)
def test_a_mask_of_the_text_means_what_it_means_in_the_core(launcher: EmulatedLauncher, bias: Any) -> None:
    told = ask(launcher, bias, 16, 32)
    wanted = bias.materialize().expand_as(told["keep"])
    assert torch.equal(told["keep"].bool(), wanted)
    valid = bias.valid_keys()
    assert torch.equal(told["exist"].bool(), (wanted.new_ones(()) if valid is None else valid).expand_as(told["exist"]))


@pytest.mark.parametrize("size", [(16, 32), (5, 7)], ids=str)
@pytest.mark.parametrize("bias", EVERY_MASK, ids=repr)
def test_no_kept_pair_lies_in_an_empty_tile_and_no_masked_one_in_a_full_tile(
    launcher: EmulatedLauncher, bias: Any, size: tuple[int, int]
) -> None:
    kept, rows, columns = bias.materialize(), *size
    told = ask(launcher, bias, rows, columns)
    kept = kept.expand_as(told["keep"])
    kinds = told["kinds"].repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    kinds = kinds[:, :, : kept.shape[2], : kept.shape[3]]
    assert kinds.max() <= MIXED
    assert not (kept & (kinds == EMPTY)).any(), "a tile is called empty that is not"
    assert not (~kept & (kinds == FULL)).any(), "a tile is called full that is not"


@pytest.mark.parametrize("bias", EVERY_MASK, ids=repr)
def test_what_is_seen_lies_within_the_spans_both_ways(launcher: EmulatedLauncher, bias: Any) -> None:
    rows, columns = 16, 16
    told = ask(launcher, bias, rows, columns)
    kept = bias.materialize().expand_as(told["keep"])
    for name, seen, size in (("keys", kept, rows), ("queries", kept.mT, columns)):
        spans = told[name].repeat_interleave(size, 2)[:, :, : seen.shape[2]]
        place = torch.arange(seen.shape[3])
        outside = (place < spans[..., :1]) | (place >= spans[..., 1:])
        assert not (seen & outside).any(), f"{name} outside the span of a tile are seen"


@pytest.mark.parametrize("bias", [b for n in ((36, 36), (33, 50)) for b in scores(*n)], ids=repr)
def test_a_score_of_the_text_adds_what_it_adds_in_the_core(launcher: EmulatedLauncher, bias: Any) -> None:
    told = ask(launcher, bias, 16, 16)["added"].double()
    wanted = sum(part.dense(CPU, torch.float64).double() for part in bias.scores)
    assert torch.allclose(told, wanted.expand_as(told), rtol=1e-6, atol=1e-6)


def test_functions_of_the_user_are_strangers_wherever_they_are() -> None:
    odd = MaskMod(lambda b, h, q, k: q % 2 == k % 2)
    scored = ScoreMod(lambda score, b, h, q, k: score * 2)
    for bias in (odd, odd & KeyPadding([3, 4]), odd + scored):
        assert odd in list(strangers(bias))
    assert scored in list(strangers(odd + scored))
    seen_whole = BlockMask(torch.eye(2).bool(), 2, full=torch.eye(2).bool(), within=KeyPadding([3, 4]))
    assert list(strangers(seen_whole)) == [seen_whole], "which keys are padding is not told by a type"
    assert not list(strangers(None))
    assert not [part for bias in EVERY_MASK for part in strangers(bias)]
