"""The unfused ops and the modules give what NATTEN 0.17.5 gives, which is the last release that has them.

It is none that can be asked for as a dependency: it has to be compiled, and does not import beside this torch as it is.
`nox -s natten_old` builds it and runs these tests; everywhere else they are skipped.
"""

from __future__ import annotations

import itertools
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import attn_natten
import attn_natten.functional
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_0_17 import VERSION, is_installed, natten_0_17

pytestmark = pytest.mark.skipif(not is_installed(), reason=f"NATTEN {VERSION} is not installed: nox -s natten_old")

SEED = 20261121
#: What a problem may have at once; a table of relative positions and causal exclude each other.
KINDS = [
    {name for name, is_there in zip(("causal", "rpb", "tokens", "dilated"), chosen) if is_there}
    for chosen in itertools.product((False, True), repeat=4)
    if not (chosen[0] and chosen[1])
]
DRAWS = 6  # of each kind and rank
#: Absolute and relative: what two orders of summation make of numbers near 1.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)


class Problem:
    """Operands and arguments, drawn."""

    def __init__(self, rank, kind, number):
        chance = random.Random(f"{SEED} {rank} {sorted(kind)} {number}")
        self.rank = rank
        self.dtype = list(TOLERANCE)[number % 2]
        self.kernel_size = tuple(chance.choice((3, 5, 7) if rank < 3 else (3, 5)) for _ in range(rank))
        self.dilation, self.is_causal = (1,) * rank, (False,) * rank
        if "dilated" in kind:
            self.dilation = tuple(chance.choice((2, 3) if rank < 3 else (1, 2, 2)) for _ in range(rank))
        if "causal" in kind:
            self.is_causal = chance.choice(
                [flags for flags in itertools.product((False, True), repeat=rank) if any(flags)]
            )
        extents = [k * d + chance.randrange(5 if rank < 3 else 2) for k, d in zip(self.kernel_size, self.dilation)]
        batch, heads, dim, dim_v = chance.choice((1, 2)), chance.choice((1, 3)), chance.choice((2, 5, 8)), 4
        generator = torch.Generator().manual_seed(chance.randrange(2**31))

        def drawn(*shape):
            return torch.randn(*shape, dtype=self.dtype, generator=generator).requires_grad_()

        self.query, self.key = drawn(batch, heads, *extents, dim), drawn(batch, heads, *extents, dim)
        self.value = drawn(batch, heads, *extents, dim_v)
        self.rpb = drawn(heads, *(2 * k - 1 for k in self.kernel_size)) if "rpb" in kind else None
        self.keys = self.values = None
        if "tokens" in kind:
            tokens = chance.choice((1, 6))
            self.keys, self.values = drawn(batch, heads, tokens, dim), drawn(batch, heads, tokens, dim_v)
        self.grad = drawn(*self.value.shape).detach()

    def __repr__(self):
        where = f"kernel_size={self.kernel_size}, dilation={self.dilation}, is_causal={self.is_causal}"
        return f"query {list(self.query.shape)}, {self.dtype}, {where}, seed {SEED}"

    def by(self, functional):
        """Logits, output and gradients, by the ops of a module."""
        qk, av = getattr(functional, f"na{self.rank}d_qk"), getattr(functional, f"na{self.rank}d_av")
        given = [x for x in (self.query, self.key, self.value, self.rpb, self.keys, self.values) if x is not None]
        where = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        logits = qk(self.query, self.key, additional_keys=self.keys, rpb=self.rpb, **where)
        out = av(logits.softmax(-1), self.value, additional_values=self.values, **where)
        return [logits.detach(), out.detach(), *torch.autograd.grad(out, given, self.grad)]


@each_rank
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(sorted(kind)) or "plain")
def test_the_unfused_ops_and_their_gradients_are_those_of_the_old_release(rank, kind):
    theirs = natten_0_17()
    for number in range(DRAWS):
        problem = Problem(rank, kind, number)
        close = {"atol": TOLERANCE[problem.dtype], "rtol": TOLERANCE[problem.dtype]}
        for one, other in zip(problem.by(attn_natten.functional), problem.by(theirs), strict=True):
            torch.testing.assert_close(one, other, **close, msg=lambda text, told=problem: f"{told}\n{text}")


@each_rank
@pytest.mark.parametrize("argument", ["dim", "rel_pos_bias", "is_causal"])
def test_a_module_with_the_weights_of_the_old_one_gives_its_output_and_gradients(rank, argument):
    natten_0_17()
    import natten

    name = f"NeighborhoodAttention{rank}D"
    arguments = {"num_heads": 3, "kernel_size": 5, "dilation": 2, argument: True, "dim": 24}
    torch.manual_seed(SEED)
    theirs, ours = (getattr(package, name)(**arguments) for package in (natten, attn_natten))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, *(10, 11, 12)[:rank], 24)
    expected = with_gradients(theirs, x)
    for mode in (False,) if argument == "rel_pos_bias" else (False, True):  # fused, the table had no gradient
        with use_fused_na(mode):
            for one, other in zip(with_gradients(ours, x), expected, strict=True):
                torch.testing.assert_close(one, other, atol=5e-5, rtol=5e-5)


@contextmanager
def use_fused_na(mode):
    """The switch; afterwards as it was."""
    before = attn_natten.is_fused_na_enabled()
    attn_natten.use_fused_na(mode)
    try:
        yield
    finally:
        attn_natten.use_fused_na(before)


def with_gradients(module, x):
    """The output, and the gradients to the input and to every parameter."""
    x = x.clone().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("return_macs", [False, True])
def test_flops_are_those_of_the_old_release(return_macs):
    natten_0_17()
    from natten import flops

    first, last, where = (2, 3, 12, 13, 8), (2, 12, 13, 3, 8), ((5, 3), (2, 1), (False, True))
    weights = (*first[:-1], 15)
    for name, shapes in {
        "fna_flop_count": [(first,) * 3, (last,) * 3],
        "na_qk_flop_count": [(first,) * 2, (last,) * 2],
        "na_av_flop_count": [(weights, first)],
    }.items():
        for given in shapes:
            options = {"is_heads_last": given[0] is last, "return_macs": return_macs}
            assert getattr(attn_natten, name)(*given, *where, **options) == getattr(flops, name)(
                *given, *where, **options
            )
