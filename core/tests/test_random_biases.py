"""Random biases of every kind, joined as a caller might: what is derived from them, and attention with them as they are
written. Each is compared with its parts, one by one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attn_core import (
    ALiBi,
    BlockMask,
    Cached,
    Causal,
    KeyPadding,
    Mask,
    Neighborhood,
    PrefixLM,
    RelPosTable,
    Segments,
    TensorBias,
    Window,
    attention,
    explain,
    mask_mod,
    score_mod,
)

SEED = 20261122
BATCH, HEADS = 2, 2
CORNERS = ("top-left", "bottom-right")
LIMITS = (None, 0, 1, 2, 5)
KERNELS = ("torch/tiled", "torch/flash", "torch/math", "torch/reference")


class Draw(random.Random):
    """Draws biases for these lengths."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.tensors = torch.Generator().manual_seed(seed)
        self.n = self.randint(0, 9)
        self.m = self.n if self.random() < 0.5 else self.randint(0, 9)

    def cut(self, length: int, count: int) -> list[int]:
        cuts = [0, *sorted(self.randint(0, length) for _ in range(count - 1)), length]
        return [end - start for start, end in itertools.pairwise(cuts)]

    def band(self) -> Causal | Window:
        corner = self.choice(CORNERS)
        return self.choice((Causal(corner), Window(self.choice(LIMITS), self.choice(LIMITS), corner)))

    def lengths(self) -> list[int]:
        return [self.randint(0, self.m) for _ in range(BATCH)]

    def documents(self) -> Segments:
        count, within = self.randint(1, 4), self.choice((None, self.band()))
        if self.random() < 0.5:
            return Segments(self.cut(self.n, count), self.cut(self.m, count), within=within)
        edges = sorted(self.randint(0, self.m) for _ in range(2 * count))
        sizes = [end - start for start, end in zip(edges[::2], edges[1::2])]
        return Segments(self.cut(self.n, count), sizes, within=within, starts_kv=edges[::2])

    def neighborhood(self) -> Mask:
        if self.n != self.m or not self.n:
            return self.band()
        extents = self.choice([(self.n,), *((a, self.n // a) for a in range(1, self.n + 1) if self.n % a == 0)])
        kernel = [self.randint(1, extent) for extent in extents]
        return Neighborhood(
            extents,
            kernel_size=kernel,
            stride=[self.randint(1, size) for size in kernel],
            dilation=[self.randint(1, extent // size) for extent, size in zip(extents, kernel)],
            is_causal=[self.random() < 0.5 for _ in extents],
        )

    def blocks(self) -> BlockMask:
        size = self.randint(1, 4), self.randint(1, 4)
        grid = -(-self.n // size[0]), -(-self.m // size[1])

        def drawn() -> torch.Tensor:
            shape = *self.choice(((), (1, 1), (BATCH, 1), (HEADS,), (BATCH, HEADS))), *grid
            return torch.rand(shape, generator=self.tensors) < self.choice((0.3, 0.7, 1.1))

        if self.random() < 0.5:
            return BlockMask(drawn(), size)
        full = drawn() if self.random() < 0.5 else None
        return BlockMask(drawn(), size, full=full, within=self.choice((self.band(), KeyPadding(self.lengths()))))

    def mask(self) -> Mask:
        step = self.randint(2, 4)
        kinds = (
            self.band,
            lambda: PrefixLM(self.randint(0, self.m + 1), self.choice(CORNERS)),
            lambda: PrefixLM(self.lengths(), self.choice(CORNERS)),
            lambda: KeyPadding(self.lengths()),
            lambda: Cached(self.lengths(), within=self.choice((None, self.band()))),
            self.documents,
            self.neighborhood,
            self.blocks,
            lambda: mask_mod(lambda b, h, q, k: (3 * q + k + b) % step > 0, batch=BATCH, num_heads=HEADS),
        )
        return self.choice(kinds)()

    def score(self):
        def trained(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self.tensors, dtype=torch.float64).requires_grad_()

        shapes = ((self.n, self.m), (HEADS, self.n, self.m), (BATCH, 1, 1, self.m), (BATCH, HEADS, self.n, 1))
        kinds = [
            lambda: ALiBi(HEADS, corner=self.choice(CORNERS)),
            lambda: ALiBi(HEADS, trained(*self.choice(((HEADS,), (BATCH, HEADS)))), self.choice(CORNERS)),
            lambda: TensorBias(trained(*self.choice(shapes))),
            lambda: score_mod(lambda score, b, h, q, k: torch.tanh(score) + 0.1 * (q - k) * (h + 1)),
        ]
        if self.n == self.m and self.n:
            kinds.append(lambda: RelPosTable(trained(HEADS, 2 * self.randint(1, 4) - 1), self.n, self.choice((1, 2))))
        return self.choice(kinds)()


def dense(mask, draw):
    kept = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask.materialize()
    return kept.expand(BATCH, HEADS, draw.n, draw.m)


def kept_by_all(masks, draw):
    kept = dense(None, draw)
    for mask in masks:
        kept = kept & dense(mask.bind(draw.n, draw.m), draw)
    return kept


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_whatever_is_derived_from_joined_masks_is_what_their_parts_say(first):
    for seed in range(SEED + first, SEED + first + 100):
        draw = Draw(seed)
        masks = [draw.mask() for _ in range(draw.choice((1, 1, 2, 3)))]
        joined = masks[0]
        for mask in masks[1:]:
            joined = joined & mask
        bound, want = joined.bind(draw.n, draw.m), kept_by_all(masks, draw)
        simple = bound.normalize()
        assert torch.equal(dense(simple, draw), want), f"seed {seed}: {joined} -> {simple}"
        assert simple is None or simple.normalize() == simple, f"seed {seed}: {joined} -> {simple}"
        for form in (bound, bound.without_padding(), *([] if simple is None else [simple])):
            assert torch.equal(dense(form, draw), want), f"seed {seed}: {form}"
            for _ in range(6):
                q0, q1 = sorted((draw.randint(0, draw.n), draw.randint(0, draw.n)))
                k0, k1 = sorted((draw.randint(0, draw.m), draw.randint(0, draw.m)))
                if q0 == q1 or k0 == k1:
                    continue
                (low, high), block = form.span(q0, q1), want[..., q0:q1, k0:k1]
                assert 0 <= low <= high <= draw.m, f"seed {seed}: {form}"
                seen = want[..., q0:q1, :low].any() or want[..., q0:q1, high:].any()
                assert not seen, f"seed {seed}: {form} has the span {low, high} at {q0, q1}"
                kind = form.tile(q0, q1, k0, k1)
                assert kind != "empty" or not block.any(), f"seed {seed}: {form} at {q0, q1, k0, k1}"
                assert kind != "full" or block.all(), f"seed {seed}: {form} at {q0, q1, k0, k1}"


def by_its_parts(query, key, value, scores, masks, draw):
    """Attention in float64, from the parts as they were written."""
    b, h = torch.arange(BATCH)[:, None, None, None], torch.arange(HEADS)[:, None, None]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    for score in scores:
        logits = score.bind(draw.n, draw.m).score(logits, b, h, torch.arange(draw.n)[:, None], torch.arange(draw.m))
    kept = kept_by_all(masks, draw)
    empty = ~kept.any(-1, keepdim=True)
    weights = logits.masked_fill(~kept, float("-inf")).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("first", range(1000, 1200, 50))
def test_attention_with_joined_biases_is_attention_by_their_parts_with_gradients(first):
    taken = dict.fromkeys(KERNELS, 0)
    for seed in range(SEED + first, SEED + first + 50):
        draw = Draw(seed)
        if not draw.n or not draw.m:
            continue
        scores, masks = [draw.score() for _ in range(draw.choice((0, 1, 1, 2)))], [draw.mask()]
        masks += [draw.mask()] if draw.random() < 0.3 else []
        parts = [*scores, *masks]
        bias = parts[0]
        for part in parts[1:]:
            bias = bias + part
        query, key, value = (
            torch.randn(BATCH, length, HEADS, 8, generator=draw.tensors, dtype=torch.float64, requires_grad=True)
            for length in (draw.n, draw.m, draw.m)
        )
        leaves = [query, key, value, *(tensor for tensor in bias.held().values() if tensor.requires_grad)]
        want = by_its_parts(query, key, value, scores, masks, draw)
        want_grads = torch.autograd.grad(want.square().sum(), leaves, materialize_grads=True)
        for name in KERNELS:
            if explain(query, key, value, bias, kernel=name).chosen is None:
                continue
            taken[name] += 1
            out = attention(query, key, value, bias, kernel=name)
            say = f"seed {seed}, {name}: {bias}"
            torch.testing.assert_close(out, want, msg=lambda text, say=say: f"{say}\n{text}")
            grads = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
            torch.testing.assert_close(grads, want_grads, msg=lambda text, say=say: f"{say}\n{text}")
    assert min(taken.values()) >= 5, taken
