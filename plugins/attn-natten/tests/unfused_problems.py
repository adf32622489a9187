"""Problems for the unfused operations: all small ones on a line, and random ones on a plane and in space."""

from __future__ import annotations

import random
from dataclasses import dataclass

import oracle
import torch
from attn_natten import unfused
from torch import Tensor

SEED = 20_17


@dataclass(frozen=True)
class Problem:
    batch: int
    heads: int
    extents: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    dim: int = 3
    dim_v: int = 4
    tokens: int = 0
    rpb: bool = False

    @property
    def rank(self) -> int:
        return len(self.extents)

    def operands(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """query, key, value, and where there are any additional_keys, additional_values and rpb; they require a
        gradient."""
        generator = torch.Generator().manual_seed(SEED)
        grid = (self.batch, self.heads, *self.extents)
        shapes = {"query": (*grid, self.dim), "key": (*grid, self.dim), "value": (*grid, self.dim_v)}
        if self.tokens:
            shapes["additional_keys"] = (self.batch, self.heads, self.tokens, self.dim)
            shapes["additional_values"] = (self.batch, self.heads, self.tokens, self.dim_v)
        if self.rpb:
            shapes["rpb"] = (self.heads, *(2 * kernel - 1 for kernel in self.kernel))
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }


def on_a_line(longest: int) -> list[Problem]:
    """Every one up to this length; those whose number is even have additional tokens, and some a bias."""
    found = []
    for length in range(2, longest + 1):
        for kernel in range(2, length + 1):
            for dilation in range(1, length // kernel + 1):
                for causal in (False, True):
                    number = len(found)
                    biased = not causal and kernel % 2 == 1
                    found.append(
                        Problem(1, 2, (length,), (kernel,), (dilation,), (causal,), 3, 4, number % 2 * 2, biased)
                    )
    return found


def at_random(count: int, rank: int, longest: int, seed: int = SEED) -> list[Problem]:
    chance = random.Random(seed)
    found = []
    while len(found) < count:
        extents, kernel, dilation, causal = [], [], [], []
        for _ in range(rank):
            extents.append(chance.randint(2, longest))
            kernel.append(chance.randint(2, min(extents[-1], 5)))
            dilation.append(chance.randint(1, extents[-1] // kernel[-1]))
            causal.append(chance.random() < 0.3)
        biased = not any(causal) and all(width % 2 for width in kernel)
        sizes = chance.randint(1, 2), chance.randint(1, 2), chance.randint(1, 4), chance.randint(1, 4)
        tokens = chance.choice((0, 0, 3))
        axes = (tuple(values) for values in (extents, kernel, dilation, causal))
        found.append(Problem(*sizes[:2], *axes, *sizes[2:], tokens, biased))
    return found


def ours(problem: Problem, operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(weights before the softmax, out)."""
    qk, av = (getattr(unfused, f"na{problem.rank}d_{name}") for name in ("qk", "av"))
    window = {"kernel_size": problem.kernel, "dilation": problem.dilation, "is_causal": problem.causal}
    keys = {name: operands[name] for name in ("additional_keys", "rpb") if name in operands}
    attn = qk(operands["query"], operands["key"], **window, **keys)
    out = av(attn.softmax(-1), operands["value"], **window, additional_values=operands.get("additional_values"))
    return attn, out


def by_definition(problem: Problem, operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same, in float64."""
    window = problem.kernel, problem.dilation, problem.causal
    keys = {name: operands[name] for name in ("additional_keys", "rpb") if name in operands}
    attn = oracle.qk(operands["query"], operands["key"], *window, **keys)
    return attn, oracle.av(
        attn.softmax(-1), operands["value"], *window, additional_values=operands.get("additional_values")
    )


def gradients(out: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED + 1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(out, list(operands.values()), upstream.to(out.dtype)))
