"""Mistakes to put into the text of cuda-ref/simple, one at a time, and the problems that show them.

What orders memory is for the checked build, which says where; what is computed is for the error budget.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from attn_core import AttnBias, Causal, Problem, TensorBias, Window
from attn_core.testing.differences import differences
from attn_core.testing.problems import build
from attn_cuda_ref.launcher import TEXT
from emu.emulator import EmulatedLauncher
from emu.faults import KernelError
from simple_directly import directly
from simple_problems import PLAIN

FORWARD, KEYS, QUERIES, LOGITS = (
    f"simple_{name}.cuh" for name in ("forward", "key_value_gradient", "query_gradient", "bias_gradient")
)
DELTA, TILE, MASKS = "simple_delta.cuh", "simple_tile.cuh", "masks.cuh"
DONE = "    __syncthreads();  // all rows are done with the tile before\n"
LOADED = "    __syncthreads();\n\n"
WARP = "    __syncwarp();  // the row's weights are there for all of its lanes\n"


def with_bias(bias: AttnBias, trained: bool = False, **changed: object) -> Problem:
    problem = replace(PLAIN, **changed)
    bound = bias.bind(problem.seqlen_q, problem.seqlen_kv)
    return replace(problem, bias=bound, bias_requires_grad=trained)


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the file; `new` is the mistake, which the problem shows."""

    file: str
    old: str
    new: str
    problem: Problem = PLAIN
    #: What the checked build says; where it is empty, the results are wrong.
    fault: str = ""


def per_batch() -> AttnBias:
    return TensorBias(torch.zeros(2, 1, 33, 50).requires_grad_())


EMPTY_ROWS = with_bias(Window(0, 0, "bottom-right"), seqlen_q=50, seqlen_kv=33)
MUTANTS = {
    "a missing barrier behind the load of a tile": Mutant(FORWARD, LOADED, "\n", fault="race|unwritten"),
    "a missing barrier before the next tile is loaded": Mutant(FORWARD, DONE, "", fault="race"),
    "a missing barrier of the warp": Mutant(FORWARD, WARP, "", fault="race|unwritten"),
    "a missing barrier in the backward": Mutant(KEYS, "  " + DONE, "", fault="race"),
    "a missing barrier of the warp in the backward": Mutant(KEYS, "  " + WARP, "", fault="race|unwritten"),
    "a span of keys that ends one too early": Mutant(
        MASKS,
        "clipped(q0 + offset - left, q1 + offset + right, seqlen_kv)",
        "clipped(q0 + offset - left, q1 - 1 + offset + right, seqlen_kv)",
        with_bias(Causal("top-left")),
    ),
    "a span of queries that begins one too late": Mutant(
        MASKS,
        "clipped(k0 - offset - right, k1 - offset + left, seqlen_q)",
        "clipped(k0 + 1 - offset - right, k1 - offset + left, seqlen_q)",
        with_bias(Window(0, 1, "top-left")),
    ),
    "a tile that is called full with one diagonal too many": Mutant(
        MASKS, "highest <= right ? FULL", "highest <= right + 1 ? FULL", with_bias(Window(64, 30, "top-left"))
    ),
    "a tail that is not filled with zeros": Mutant(
        TILE,
        "tile[row * pitch(DIM) + d] = is_there ? ",
        "if (is_there) tile[row * pitch(DIM) + d] = is_there ? ",
        fault="unwritten",
    ),
    "a tail that is read beyond the tensor": Mutant(
        TILE, "first + row < end && d < DIM", "d < DIM", fault="out of bounds"
    ),
    "a tile of values that stays the first": Mutant(
        FORWARD,
        "    load<HEAD_DIM_V>(values,",
        "    if (k0 == span.low / KEYS * KEYS) load<HEAD_DIM_V>(values,",
    ),
    "the key head of another group": Mutant(
        FORWARD, "w.h / (int)heads_per_kv", "w.h % (int)(num_heads / heads_per_kv)"
    ),
    "gradients of keys from one head of the group": Mutant(
        KEYS, "h < (h_kv + 1) * (int)heads_per_kv", "h <= h_kv * (int)heads_per_kv"
    ),
    "a lost rescale of the sums": Mutant(FORWARD, "sums[i] *= shrunk;", ";"),
    "a lost rescale of the total": Mutant(FORWARD, "total * shrunk + lanes_sum", "total + lanes_sum"),
    "the output of a row without keys": Mutant(
        FORWARD,
        "total > 0.0f ? sums[i] / total : 0.0f",
        "sums[i] / total",
        EMPTY_ROWS,
    ),
    "the LSE of a row without keys": Mutant(
        FORWARD,
        "total > 0.0f ? highest + logf(total) : NEGATIVE_INFINITY",
        "total > 0.0f ? highest + logf(total) : 0.0f",
        EMPTY_ROWS,
    ),
    "-inf less -inf": Mutant(
        FORWARD,
        "highest == NEGATIVE_INFINITY ? 0.0f : highest",
        "highest",
        EMPTY_ROWS,
    ),
    "the gradient of the bias summed over heads where batch entries share it": Mutant(
        LOGITS,
        "b_end = bias_batch == 1 ? (int)batch : b_of_bias + 1",
        "b_end = bias_heads == 1 ? (int)batch : b_of_bias + 1",
        with_bias(per_batch(), trained=True),
    ),
    "the gradient of the LSE forgotten": Mutant(DELTA, "grad_lse ?", "false ?"),
    "the derivative of the softcap forgotten": Mutant(
        TILE, "derivative *= 1.0f - capped * capped;", "", replace(PLAIN, softcap=1.5)
    ),
}


def wrong(problem: Problem, build_name: str, texts: Path = TEXT) -> str:
    """What is wrong with a text: the fault, or the comparisons that do not hold; empty where all is right."""
    inputs = build(problem, seed=1, bias=problem.bias)
    kernel = directly(EmulatedLauncher(build_name, schedule="random", seed=5, texts=texts))
    try:
        [comparisons] = differences(problem, inputs, kernel)
    except KernelError as error:
        return str(error)
    return "\n".join(str(comparison) for comparison in comparisons if not comparison)


def check(mutant: Mutant, folder: Path) -> None:
    """The mistake is caught, and without it nothing is wrong."""
    texts = folder / "cuda"
    shutil.copytree(TEXT, texts)
    text = (texts / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: {mutant.old!r} does not stand there once"
    (texts / mutant.file).write_text(text.replace(mutant.old, mutant.new))

    build_name = "checked" if mutant.fault else "plain"
    problem = replace(mutant.problem, num_heads=2, batch=1) if mutant.fault else mutant.problem
    assert not wrong(problem, build_name)
    message = wrong(problem, build_name, texts)
    assert re.match(mutant.fault or r"\w+(\.\w+)*: is (beyond the budget|NaN)", message), message or "not caught"
