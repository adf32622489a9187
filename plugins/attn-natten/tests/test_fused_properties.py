"""na1d, na2d and na3d against the definition, over random problems: output, LSE, and every gradient.

In float32 against float64; most of the problems by the kernel that follows the mask, which is not the best at sizes as
small as these.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import attn_natten
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import oracle

SEED = 20261121
PROBLEMS = 505  #: of each rank
TOKENS = 24  #: about so many, so that the definition's loops end
TOLERANCE = 1e-5  #: of the largest number of a tensor, or of 1 where all are smaller


@dataclass(frozen=True)
class Problem:
    extents: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    scale: float | None
    has_rpb: bool
    tokens: int | None  #: additional ones
    backend: str | None


def draw(rank: int, rng: random.Random) -> Problem:
    has_rpb = rng.random() < 0.3
    least = 3 if has_rpb else 2  # keys in a window
    extents, kernel, dilation = [], [], []
    for axis in range(rank):
        left = TOKENS / prod(extents)
        step = rng.choice((1, 1, 1, 2, 3)) if max(dilation, default=1) == 1 or left >= 6 else 1
        most = max(least, round(left ** (1 / (rank - axis))) + 1)
        dilation.append(step)
        extents.append(rng.randint(least, most) if step == 1 else least * step + rng.randint(0, 2))
        widths = range(least, extents[-1] // dilation[-1] + 1, 2 if has_rpb else 1)
        kernel.append(rng.choice(widths))
    axes = list(zip(extents, kernel, dilation))
    rng.shuffle(axes)
    extents, kernel, dilation = map(list, zip(*axes))
    causal = [not has_rpb and rng.random() < 0.35 for _ in extents]
    num_kv_heads = rng.choice((1, 1, 2))
    return Problem(
        extents=tuple(extents),
        kernel=tuple(kernel),
        stride=tuple(rng.randint(1, width) if rng.random() < 0.4 else 1 for width in kernel),
        dilation=tuple(dilation),
        causal=tuple(causal),
        batch=rng.choice((1, 1, 2)),
        num_heads=num_kv_heads * rng.choice((1, 1, 2, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice((3, 4, 8)),
        head_dim_v=rng.choice((4, 8, 8)),
        scale=rng.choice((None, None, 0.7, 0.0, -0.5)),
        has_rpb=has_rpb,
        tokens=rng.choice((None, None, 0, 1, 5)),
        backend=None,
    )


def tensors(problem: Problem, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Heads last, float32."""
    p = problem
    shapes = {
        "query": (p.batch, *p.extents, p.num_heads, p.head_dim),
        "key": (p.batch, *p.extents, p.num_kv_heads, p.head_dim),
        "value": (p.batch, *p.extents, p.num_kv_heads, p.head_dim_v),
    }
    if p.has_rpb:
        shapes["rpb"] = (p.num_heads, *(2 * width - 1 for width in p.kernel))
    if p.tokens is not None:
        shapes["additional_keys"] = (p.batch, p.tokens, p.num_kv_heads, p.head_dim)
        shapes["additional_values"] = (p.batch, p.tokens, p.num_kv_heads, p.head_dim_v)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def expected(problem: Problem, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), heads last, from the definition."""
    first = {name: tensor if name == "rpb" else tensor.movedim(-2, 1) for name, tensor in given.items()}
    out, lse = oracle.attention(
        kernel=problem.kernel,
        stride=problem.stride,
        dilation=problem.dilation,
        causal=problem.causal,
        scale=problem.scale,
        **first,
    )
    return out.movedim(1, -2), lse.movedim(1, -1)


def differences(problem: Problem, generator: torch.Generator) -> list[str]:
    """What differs by more than the tolerance."""
    p, given = problem, tensors(problem, generator)
    precise = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    function = {1: attn_natten.na1d, 2: attn_natten.na2d, 3: attn_natten.na3d}[len(p.extents)]
    out, lse = function(
        given["query"],
        given["key"],
        given["value"],
        p.kernel,
        stride=p.stride,
        dilation=p.dilation,
        is_causal=p.causal,
        scale=p.scale,
        backend=p.backend,
        return_lse=True,
        **{name: tensor for name, tensor in given.items() if name not in ("query", "key", "value")},
    )
    wanted = expected(p, precise)
    assert out.dtype is lse.dtype is torch.float32
    assert out.shape == (*given["query"].shape[:-1], p.head_dim_v)
    assert lse.shape == given["query"].shape[:-1]
    weights = [torch.randn(tensor.shape, generator=generator) for tensor in (out, lse)]
    sums = ((out * weights[0]).sum() + (lse * weights[1]).sum(), sum((w * t).sum() for w, t in zip(weights, wanted)))
    grads = [
        torch.autograd.grad(total, tuple(leaves.values())) for total, leaves in zip(sums, (given, precise), strict=True)
    ]
    pairs = {"out": (out, wanted[0]), "lse": (lse, wanted[1])}
    pairs |= {f"d_{name}": pair for name, pair in zip(given, zip(*grads))}
    found = []
    for name, (got, want) in pairs.items():
        if want.numel():
            error = (got.double() - want).abs().max().item() / max(want.abs().max().item(), 1.0)
            if not error <= TOLERANCE:
                found.append(f"{name}: {error:.2e}")
    return found


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_fused_calls_and_their_gradients_are_those_of_the_definition(rank):
    rng, generator = random.Random(SEED + rank), torch.Generator().manual_seed(SEED + rank)
    problems = [draw(rank, rng) for _ in range(PROBLEMS)]
    problems = [replace(p, backend="torch/tiled" if i % 4 else None) for i, p in enumerate(problems)]
    wrong = {problem: found for problem in problems if (found := differences(problem, generator))}
    told = "\n".join(f"{problem}: {', '.join(found)}" for problem, found in wrong.items())
    assert not wrong, f"seed {SEED + rank}, {len(wrong)} of {PROBLEMS} problems:\n{told}"


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_the_problems_are_of_every_kind(rank):
    problems = [draw(rank, random.Random(SEED + rank + i)) for i in range(400)]
    kinds = {
        "even kernel": lambda p: any(width % 2 == 0 for width in p.kernel),
        "stride": lambda p: max(p.stride) > 1,
        "dilation": lambda p: max(p.dilation) > 1,
        "causal": lambda p: any(p.causal),
        "causal on some axes only": lambda p: rank == 1 or (any(p.causal) and not all(p.causal)),
        "rpb": lambda p: p.has_rpb,
        "rpb with stride and dilation": lambda p: p.has_rpb and max(p.stride) > 1 and max(p.dilation) > 1,
        "additional tokens": lambda p: p.tokens,
        "additional tokens, none": lambda p: p.tokens == 0,
        "fewer heads of key": lambda p: p.num_heads > p.num_kv_heads,
        "other head_dim of value": lambda p: p.head_dim != p.head_dim_v,
        "scale of 0": lambda p: p.scale == 0.0,
        "whole axes": lambda p: p.kernel == p.extents,
    }
    missing = [name for name, is_of in kinds.items() if sum(map(bool, map(is_of, problems))) < 3]
    assert not missing
