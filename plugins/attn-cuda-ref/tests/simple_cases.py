"""Hundreds of small problems for cuda-ref/simple: each kind of bias with several dtypes and head sizes, and for each of
these, which is one compilation, lengths, heads, layouts and magnitudes drawn from lists of odd ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from attn_core import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    KeyPadding,
    Neighborhood,
    PrefixLM,
    Problem,
    RelPosTable,
    Segments,
    TensorBias,
    Window,
)
from attn_core.reference import reference_attention
from attn_core.testing.differences import by_kernel, differences, results_of
from attn_core.testing.problems import LAYOUTS, Inputs, Layout, build

SEED = 20261121
CASES_OF_A_KIND = 10
#: (seqlen_q, seqlen_kv): around a block's 16 queries and a tile's 32 keys, ragged, one, and long beside short.
LENGTHS = ((1, 1), (16, 16), (17, 33), (33, 17), (37, 37), (1, 45), (45, 1), (15, 64), (64, 31), (40, 40), (2, 3))
#: (num_heads, num_kv_heads)
HEADS = ((1, 1), (2, 2), (4, 2), (3, 1), (6, 2))
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Draw:
    """What a bias may depend on."""

    seqlen_q: int
    seqlen_kv: int
    batch: int
    heads: int
    chance: random.Random

    def keep(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator()) > 0.4

    def normal(self, *shape: int, dtype: torch.dtype = F32, trained: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator()).to(dtype).requires_grad_(trained)

    def lengths(self, most: int) -> torch.Tensor:
        return torch.tensor([self.chance.randint(0, most) for _ in range(self.batch)])

    def corner(self) -> str:
        return self.chance.choice(("top-left", "bottom-right"))

    def parts(self, total: int, count: int) -> list[int]:
        cuts = sorted(self.chance.randint(0, total) for _ in range(count - 1))
        return [after - before for before, after in zip([0, *cuts], [*cuts, total])]

    def some(self, *shape: int) -> tuple[int, ...]:
        """The shape, with some of its dimensions broadcast."""
        return tuple(self.chance.choice((1, size)) for size in shape)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.chance.randrange(2**31))


@dataclass(frozen=True)
class Kind:
    """A kind of bias, and the compilations that it is tried with: (dtype, head_dim, head_dim_v)."""

    bias: Callable[[Draw], AttnBias | None]
    tried: tuple[tuple[torch.dtype, int, int], ...]
    softcap: float | None = None
    #: Lengths that the kind has of its own.
    lengths: tuple[tuple[int, int], ...] = LENGTHS


def _window(x: Draw) -> AttnBias:
    limits = [x.chance.choice((None, 0, 1, 5, 20)) for _ in range(2)]
    return Window(limits[0], limits[1], x.corner()) if limits != [None, None] else Window(3, 2, x.corner())


def _segments(x: Draw, within: AttnBias | None = None) -> AttnBias:
    count = x.chance.randint(1, 5)
    return Segments(x.parts(x.seqlen_q, count), x.parts(x.seqlen_kv, count), within=within)


def _blocks(x: Draw, within: AttnBias | None = None) -> AttnBias:
    size = x.chance.choice(((16, 32), (5, 7), (64, 64)))
    shape = math.ceil(x.seqlen_q / size[0]), math.ceil(x.seqlen_kv / size[1])
    return BlockMask(x.keep(*x.chance.choice(((), (x.heads,), (x.batch, x.heads))), *shape), size, within=within)


SQUARE = tuple((n, n) for n in (1, 16, 17, 37, 40, 64))
KINDS = {
    "none": Kind(lambda x: None, ((F32, 32, 32), (F16, 7, 13), (BF16, 64, 64), (F32, 1, 1), (F16, 256, 256))),
    "none softcap": Kind(lambda x: None, ((F32, 24, 24), (BF16, 40, 16)), softcap=5.0),
    "causal": Kind(lambda x: Causal(x.corner()), ((F32, 16, 16), (F16, 32, 32), (BF16, 31, 33))),
    "causal softcap": Kind(lambda x: Causal(x.corner()), ((F16, 16, 16),), softcap=2.0),
    "window": Kind(_window, ((F32, 32, 8), (F16, 128, 128), (BF16, 20, 20))),
    "prefix": Kind(lambda x: PrefixLM(x.chance.randint(0, x.seqlen_kv), x.corner()), ((F32, 9, 9), (BF16, 32, 32))),
    "prefixes": Kind(lambda x: PrefixLM(x.lengths(x.seqlen_kv), x.corner()), ((F16, 24, 40),)),
    "key padding": Kind(lambda x: KeyPadding(x.lengths(x.seqlen_kv)), ((F32, 32, 32), (BF16, 80, 80))),
    "cached causal": Kind(
        lambda x: Cached(x.lengths(x.seqlen_kv), within=Causal("bottom-right")), ((F32, 8, 8), (F16, 64, 64))
    ),
    "segments": Kind(_segments, ((F32, 32, 32), (F16, 12, 12), (BF16, 16, 16))),
    "segments causal": Kind(lambda x: _segments(x, Causal("bottom-right")), ((F32, 33, 17), (BF16, 64, 64))),
    "neighborhood": Kind(
        lambda x: Neighborhood(37, kernel_size=5, stride=2, dilation=3, is_causal=x.chance.random() < 0.5),
        ((F32, 32, 32), (F16, 16, 16)),
        lengths=((37, 37),),
    ),
    "neighborhood of an image": Kind(
        lambda x: Neighborhood((5, 8), kernel_size=(3, 2), dilation=(1, 3), is_causal=(False, True)),
        ((F32, 16, 16), (BF16, 32, 32)),
        lengths=((40, 40),),
    ),
    "block mask": Kind(_blocks, ((F32, 32, 32), (F16, 48, 48))),
    "block mask causal": Kind(lambda x: _blocks(x, Causal(x.corner())), ((BF16, 16, 16),)),
    "boolean tensor": Kind(
        lambda x: TensorBias(x.keep(*x.some(x.batch, x.heads, x.seqlen_q), x.seqlen_kv)),
        ((F32, 16, 16), (F16, 40, 40), (BF16, 8, 8)),
    ),
    "tensor": Kind(
        lambda x: TensorBias(x.normal(*x.some(x.batch, x.heads, x.seqlen_q, x.seqlen_kv), trained=True)),
        ((F32, 32, 32), (F32, 5, 11), (F16, 16, 16), (BF16, 64, 64)),
    ),
    "tensor of float16": Kind(
        lambda x: TensorBias(x.normal(*x.some(x.heads), x.seqlen_q, x.seqlen_kv, dtype=F16, trained=True)),
        ((F16, 32, 32),),
    ),
    "alibi": Kind(lambda x: ALiBi(x.heads, corner=x.corner()), ((F32, 32, 32), (BF16, 96, 96))),
    "alibi trained": Kind(
        lambda x: ALiBi(x.heads, x.normal(x.heads, trained=True), x.corner()), ((F32, 16, 16), (F16, 24, 24))
    ),
    "table": Kind(
        lambda x: RelPosTable(x.normal(x.heads, 5, 7, trained=True), (5, 8)),
        ((F32, 32, 32), (F16, 16, 16)),
        lengths=((40, 40),),
    ),
    "causal and key padding": Kind(
        lambda x: Causal(x.corner()) & KeyPadding(x.lengths(x.seqlen_kv)), ((F32, 32, 32), (F16, 72, 72))
    ),
    "alibi and tensor and causal": Kind(
        lambda x: (
            ALiBi(x.heads, x.normal(x.heads, trained=True), x.corner())
            + TensorBias(x.normal(x.seqlen_q, x.seqlen_kv, trained=True))
            + Causal(x.corner())
        ),
        ((F32, 16, 16), (BF16, 32, 32)),
    ),
}


@dataclass(frozen=True)
class Case:
    """One problem and its operands' seed."""

    name: str
    problem: Problem
    bias: AttnBias | None
    seed: int
    layout: Layout
    magnitude: float

    def inputs(self) -> Inputs:
        return build(self.problem, seed=self.seed, layout=self.layout, magnitude=self.magnitude, bias=self.bias)


def cases() -> Iterator[Case]:
    """The same at every run."""
    for kind_name, kind in KINDS.items():
        for dtype, head_dim, head_dim_v in kind.tried:
            for number in range(CASES_OF_A_KIND):
                yield case(kind_name, kind, dtype, head_dim, head_dim_v, number)


def case(name: str, kind: Kind, dtype: torch.dtype, head_dim: int, head_dim_v: int, number: int) -> Case:
    short = str(dtype).removeprefix("torch.")
    label = f"{name}, {short}, head_dim {head_dim}:{head_dim_v}"
    chance = random.Random(f"{SEED} {label} {number}")
    seqlen_q, seqlen_kv = kind.lengths[number % len(kind.lengths)]
    num_heads, num_kv_heads = chance.choice(HEADS)
    batch = chance.choice((1, 2, 3))
    bias = kind.bias(Draw(seqlen_q, seqlen_kv, batch, num_heads, chance))
    if bias is not None:
        bias = bias.bind(seqlen_q, seqlen_kv).normalize()
    problem = Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device="cpu",
        bias=bias,
        scale=chance.choice((head_dim**-0.5, head_dim**-0.5, 0.3)),
        softcap=kind.softcap,
        return_lse=chance.random() < 0.7,
        requires_grad=True,
        bias_requires_grad=bias is not None and any(x.requires_grad for x in bias.held().values()),
        strided_head_dim=chance.random() < 0.15,
    )
    return Case(
        name=f"{label}, {seqlen_q} x {seqlen_kv}, heads {num_heads}:{num_kv_heads}, batch {batch}, {number}",
        problem=problem,
        bias=bias,
        seed=chance.randrange(2**31),
        layout=chance.choice(LAYOUTS),
        magnitude=chance.choice((1.0, 1.0, 1.0, 10.0)),
    )


#: How far the LSE may lie from the reference's, for each unit of its size above 1.
LSE_ERROR = 1e-4


def check(case: Case, kernel_name: str) -> None:
    """Results and gradients within the budget, LSE within LSE_ERROR, rows without keys exact, two runs equal."""
    problem, inputs, seen = case.problem, case.inputs(), []

    def kernel(x: Inputs) -> Any:
        seen.append(by_kernel(kernel_name)(x))
        return seen[-1]

    [comparisons] = differences(problem, inputs, kernel)
    assert all(comparisons), "\n".join(map(str, comparisons))

    results = results_of(kernel, problem, inputs)
    for first, again in zip(*(x if problem.return_lse else (x,) for x in seen)):
        assert torch.equal(first, again)
    assert not any(result.isnan().any() for result in results.values())

    _, lse = reference_attention(
        inputs.query, inputs.key, inputs.value, inputs.bias, scale=problem.scale, softcap=problem.softcap
    )
    empty = lse.isneginf()
    if problem.return_lse:
        assert torch.equal(results["lse"].isneginf(), empty)
        error = (results["lse"].double() - lse)[~empty].abs()
        assert (error <= LSE_ERROR * lse[~empty].abs().clamp(min=1.0)).all()
    rows = empty.transpose(1, 2)
    assert not results["out"][rows].any()
    assert not results["dq"][rows].any()
