"""What torch/tiled counts of a problem with scores, before it runs, is what it then does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attn_core import (
    ALiBi,
    Causal,
    KeyPadding,
    Neighborhood,
    Problem,
    RelPosTable,
    Score,
    Segments,
    Window,
    explain,
    plan,
)
from attn_core.torch_kernels.tiled import KERNEL
from attn_core.torch_kernels.tiling import dense
from attn_core.torch_kernels.tiling import work_with_scores as counting
from attn_core.torch_kernels.tiling.scores import Placed, Scores

NAME = "torch/tiled"
BATCH, HEADS = 2, 4


@dataclass(frozen=True)
class Sine(Score):
    lengths: tuple[int, int] | None = None

    def added(self, b, h, q, k, dtype):
        return torch.sin((q - 2 * k).to(dtype))


def table(*shape):
    return torch.randn(HEADS, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


#: name -> (bias, length)
KINDS = {
    "alibi": (ALiBi(HEADS), 600),
    "alibi-causal": (Causal() + ALiBi(HEADS, torch.rand(HEADS).requires_grad_()), 600),
    "alibi-window": (Window(20, 0) + ALiBi(HEADS), 300),
    "alibi-documents": (Segments([40] * 9 + [290], within=Causal()) + ALiBi(HEADS), 650),
    "table": (RelPosTable(table(9), 150), 150),
    "table-window": (Window(9, 9) + RelPosTable(table(19), 300), 300),
    "table-plane": (Neighborhood((24, 24), kernel_size=5) + RelPosTable(table(9, 9), (24, 24)), 576),
    "table-plane-dilated": (
        Neighborhood((24, 24), kernel_size=5, dilation=2) + RelPosTable(table(9, 9), (24, 24)),
        576,
    ),
    "own": (Sine(), 300),
    "own-causal": (Causal() + Sine(), 700),
    "two": (Window(20, 0) + ALiBi(HEADS) + Sine(), 300),
}


def problem_of(bias, seqlen, grad, bias_grad):
    return Problem(
        batch=BATCH,
        seqlen_q=seqlen,
        seqlen_kv=seqlen,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=8,
        head_dim_v=8,
        dtype=torch.float32,
        device="cpu",
        bias=bias.bind(seqlen, seqlen).normalize().without_data(),
        scale=1.0,
        requires_grad=grad,
        bias_requires_grad=bias_grad,
    )


class Done:
    """What a call did: pairs and calls of dense kernels, and numbers of rules that are no line."""

    def __init__(self, monkeypatch):
        self.pairs = self.calls = self.numbers = 0
        for name, operands in (("forward", (0, 1)), ("backward", (1, 2)), ("backward_with_logits", (1, 2))):
            monkeypatch.setattr(dense, name, self.counting(getattr(dense, name), *operands))
        block = Placed._block

        def made(placed, rule, tiles):
            found = block(placed, rule, tiles)
            if not isinstance(rule, ALiBi) and not (isinstance(rule, RelPosTable) and len(rule.extents) == 1):
                lanes = len(placed.wanted(rule, one_strip=placed.same(rule, tiles)).h)
                self.numbers += found.shape[0] * lanes * found.shape[2] * found.shape[3]
            return found

        monkeypatch.setattr(Placed, "_block", made)

    def counting(self, function, q, k):
        def counted(*operands):
            tiles, lanes, rows, _ = operands[q].shape
            self.pairs += tiles * lanes * rows * operands[k].shape[2]
            self.calls += 1
            return function(*operands)

        return counted


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", KINDS)
def test_pairs_calls_and_numbers_are_those_of_the_call(name, backward, monkeypatch):
    bias, seqlen = KINDS[name]
    with_gradient = any(tensor.requires_grad for tensor in bias.held().values())
    problem = problem_of(bias, seqlen, backward, backward and with_gradient)
    for constant, value in (("BLOCK", 0.0), ("STRIPS", 0.0), ("COPIES", 0.0), ("LINE", 0.0), ("AXIS", 0.5)):
        monkeypatch.setattr(counting, constant, value)
    scores = Scores(problem.bias.scores)
    counted = counting.counted(problem, problem.bias.mask, scores, backward=backward)

    # Heads first, so that one batch of tiles has the heads of all batch entries.
    operands = [torch.randn(BATCH, HEADS, seqlen, 8, requires_grad=backward) for _ in range(3)]
    run = plan(*operands, bias, kernel=NAME, layout="heads-first")
    if backward:
        out = run(*operands, bias)
        done = Done(monkeypatch)
        out.backward(torch.ones_like(out))
    else:
        done = Done(monkeypatch)
        run(*operands, bias)
    assert (counted.pairs, counted.parts, counted.added) == (done.pairs, done.calls, done.numbers)


def test_what_a_rule_makes_is_in_the_estimate():
    wide, narrow = (problem_of(Window(n, 0) + Sine(), 600, False, False) for n in (200, 20))
    for problem in (wide, narrow):
        assert KERNEL.work(problem).added > 0
        assert KERNEL.quantities(problem)["added"] == KERNEL.work(problem).added
    assert KERNEL.work(wide).added > KERNEL.work(narrow).added
    without = problem_of(Window(200, 0), 600, False, False)
    assert KERNEL.work(without).added == 0
    assert KERNEL.terms(wide).seconds(wide) > KERNEL.terms(without).seconds(without)


def test_a_gradient_to_a_table_makes_the_estimate_longer():
    seconds = [
        KERNEL.terms(problem).seconds(problem)
        for problem in (problem_of(KINDS["table-plane"][0], 576, True, grad) for grad in (False, True))
    ]
    assert seconds[1] > 1.2 * seconds[0]


def test_a_mask_that_holds_data_is_not_cut_before_the_call():
    bias = KeyPadding(torch.tensor([50, 70])) + ALiBi(HEADS)
    query, key, value = torch.randn(3, BATCH, 70, HEADS, 8)
    assert KERNEL.work(problem_of(bias.without_padding(), 70, False, False)) is None
    assert explain(query, key, value, bias)[NAME].seconds > 0
