"""A bias that says it was made for any batch and head, and has more of them in its dense form, is an error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attn_core import (
    Causal,
    InputError,
    KeyPadding,
    Mask,
    Score,
    attention,
    reference_attention,
)

SEQLEN = 6


@dataclass(frozen=True)
class PerHead(Mask):
    """Each head has a distance of its own, which `batch_and_heads` keeps to itself."""

    distances: tuple[int, ...]
    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        distances = torch.tensor(self.distances)[:, None, None]
        return (q - k).abs() <= distances


@dataclass(frozen=True)
class Honest(PerHead):
    @property
    def batch_and_heads(self):
        return 1, len(self.distances)

    def keep(self, b, h, q, k):
        return (q - k).abs() <= torch.tensor(self.distances)[h]


@dataclass(frozen=True)
class PerEntry(Score):
    """Each batch entry has a factor of its own, the same."""

    factors: tuple[float, ...]
    lengths: tuple[int, int] | None = None

    def added(self, b, h, q, k, dtype):
        return torch.tensor(self.factors, dtype=dtype)[:, None, None, None] * (q - k).abs()


@dataclass(frozen=True)
class Written(Mask):
    """States a rule, but writes out another shape."""

    shape: tuple[int, ...]
    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return q >= k

    def materialize(self, device=None):
        return torch.ones(self.shape, dtype=torch.bool, device=device)


def operands(batch=2, num_heads=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, SEQLEN, num_heads, 8, generator=generator) for _ in range(3)]


WRONG = {
    "a mask of more heads": (PerHead((1, 2, 3, 4)), "num_heads=1", "num_heads=4"),
    "a mask of other heads than the call": (PerHead((1, 2, 3)), "num_heads=1", "num_heads=3"),
    "a score of more batch entries": (PerEntry((1.0, 2.0)), "batch=1", "batch=2"),
    "a mask beside another": (PerHead((1, 2, 3, 4)) & Causal(), "num_heads=1", "num_heads=4"),
    "a mask beside padding": (PerHead((1, 2, 3, 4)) & KeyPadding([3, 6]), "num_heads=1", "num_heads=4"),
    "a score beside a mask": (PerEntry((1.0, 2.0)) + Causal(), "batch=1", "batch=2"),
}
KERNELS = ["torch/flash", "torch/math", "torch/flex", "torch/tiled", "torch/reference", None]


@pytest.mark.parametrize("name", KERNELS, ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_more_than_it_says_is_an_error_that_names_the_axis_on_every_path(case, name):
    bias, says, has = WRONG[case]
    for shape in ((2, 4), (2, 1), (1, 4)):
        if shape[0] == 1 and "padding" in case:
            continue
        inputs = operands(*shape)
        with pytest.raises(InputError) as error:
            attention(*inputs, bias, kernel=name)
        assert type(bias.parts[0] if hasattr(bias, "parts") else bias).__name__ in str(error.value)
        assert says in str(error.value)
        assert has in str(error.value)
        assert "batch_and_heads" in str(error.value)


@pytest.mark.parametrize("name", ["torch/flash", "torch/math", "torch/reference"])
@pytest.mark.parametrize(
    ("shape", "text"),
    [((4, 6, 6), "num_heads=4"), ((6, 5), "seqlen_kv=5"), ((3, 6), "seqlen_q=3"), ((1, 1, 1, 6, 6), "5 dimensions")],
    ids=str,
)
def test_a_dense_form_of_another_shape_is_an_error_that_names_the_axis(shape, text, name):
    with pytest.raises(InputError, match=text):
        attention(*operands(), Written(shape), kernel=name)


@pytest.mark.parametrize("case", ["a mask of more heads", "a score of more batch entries"])
@pytest.mark.parametrize("name", ["torch/flash", "torch/reference"])
def test_it_is_one_while_a_graph_is_traced(case, name):
    torch._dynamo.reset()
    bias, _, has = WRONG[case]
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, bias, kernel=name), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=has):
        compiled(*operands())


def test_one_that_says_what_it_has_is_right_on_every_kernel():
    bias = Honest((1, 2, 3, 4))
    inputs = operands()
    want = reference_attention(*inputs, bias)[0].float()
    for name in KERNELS:
        torch.testing.assert_close(attention(*inputs, bias, kernel=name), want)
