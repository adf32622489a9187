"""Biases of every kind of the core, with what is odd about each: empty rows, borders, broadcast tensors."""

from __future__ import annotations

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
    RelPosTable,
    Segments,
    TensorBias,
    Window,
)

SEED = 20261121
BATCH, HEADS = 2, 2
LENGTHS = ((37, 37), (33, 50), (50, 33))


def masks(seqlen_q: int, seqlen_kv: int) -> list[AttnBias]:
    """Of these lengths, bound; with tensors of BATCH and HEADS."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) > 0.5

    blocks, blocks_full = (seqlen_q + 11) // 12, (seqlen_kv + 19) // 20
    few = min(seqlen_q, seqlen_kv) // 3
    lengths = torch.tensor([0, seqlen_kv - 4])
    found: list[AttnBias] = [
        *(Causal(corner) for corner in ("top-left", "bottom-right")),
        *(
            Window(left, right, corner)
            for corner in ("top-left", "bottom-right")
            for left, right in ((5, 0), (0, 5), (3, 2), (None, 4), (20, None))
        ),
        PrefixLM(7, "top-left"),
        PrefixLM(torch.tensor([0, 21]), "bottom-right"),
        KeyPadding(lengths),
        KeyPadding(torch.tensor([seqlen_kv - 1], dtype=torch.int32)),
        Cached(lengths, within=Causal("bottom-right")),
        Cached(lengths.int(), within=Window(6, 1, "bottom-right")),
        Cached(lengths, within=Window(6, 1, "top-left")),
        Segments([few, 0, 1, seqlen_q - few - 1], [1, 3, seqlen_kv - few - 4, few], within=None),
        Segments([few, 1, seqlen_q - few - 1], [1, seqlen_kv - few - 1, few], within=Causal("bottom-right")),
        Segments([few, seqlen_q - few], [few, 5], starts_kv=[2, few + 7], within=Window(4, 2, "top-left")),
        BlockMask(drawn(blocks, (seqlen_kv + 15) // 16), (12, 16)),
        BlockMask(
            drawn(BATCH, HEADS, blocks, blocks_full),
            (12, 20),
            full=drawn(BATCH, 1, blocks, blocks_full),
            within=Causal("bottom-right"),
        ),
        BlockMask(drawn(HEADS, blocks, blocks_full), (12, 20), within=KeyPadding(lengths)),
        TensorBias(drawn(BATCH, 1, seqlen_q, seqlen_kv)),
        TensorBias(drawn(seqlen_q, 1)),
        Causal("bottom-right") & KeyPadding(lengths),
        BlockMask(drawn(blocks, (seqlen_kv + 15) // 16), (12, 16)) & Window(9, 9, "top-left") & KeyPadding(lengths),
    ]
    if seqlen_q == seqlen_kv:
        found += neighborhoods()
    return [bias.bind(seqlen_q, seqlen_kv) for bias in found]


def neighborhoods() -> list[AttnBias]:
    """On lines of 37 tokens: the extents of grids are others, so these are bound apart."""
    return [
        Neighborhood(37, kernel_size=7),
        Neighborhood(37, kernel_size=8, stride=5),
        Neighborhood(37, kernel_size=4, dilation=5),
        Neighborhood(37, kernel_size=6, stride=4, dilation=3, is_causal=True),
    ]


def grids() -> list[AttnBias]:
    """Neighborhoods of two and three axes, bound to their own tokens."""
    found = [
        Neighborhood((6, 9), kernel_size=(3, 5)),
        Neighborhood((7, 8), kernel_size=(3, 2), stride=(2, 1), dilation=(2, 3), is_causal=(False, True)),
        Neighborhood((12, 3), kernel_size=(4, 3), stride=(3, 2), is_causal=(True, False)),
        Neighborhood((3, 4, 5), kernel_size=(2, 3, 4)),
        Neighborhood((4, 4, 4), kernel_size=2, stride=(2, 1, 2), dilation=2, is_causal=(True, False, True)),
    ]
    tokens = [torch.Size(bias.extents).numel() for bias in found]
    return [bias.bind(count, count) for bias, count in zip(found, tokens)]


def scores(seqlen_q: int, seqlen_kv: int, trained: bool = False) -> list[AttnBias]:
    """Of these lengths, bound; tensors require a gradient where `trained`."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(trained)

    found: list[AttnBias] = [
        TensorBias(drawn(seqlen_q, seqlen_kv)),
        TensorBias(drawn(BATCH, 1, 1, seqlen_kv)),
        TensorBias(drawn(BATCH, HEADS, seqlen_q, seqlen_kv, dtype=torch.float16)),
        TensorBias(drawn(1, HEADS, seqlen_q, 1, dtype=torch.bfloat16)),
        TensorBias(drawn(1, 1, 1, 1, dtype=torch.float64)),
        ALiBi(HEADS, drawn(HEADS), "bottom-right"),
        ALiBi(HEADS, drawn(BATCH, HEADS), "top-left"),
        ALiBi(HEADS, drawn(HEADS), "top-left") + TensorBias(drawn(seqlen_q, seqlen_kv)) + Causal("top-left"),
    ]
    if not trained:
        found.append(ALiBi(HEADS, corner="bottom-right"))
    if seqlen_q == seqlen_kv == 36:
        found += [
            RelPosTable(drawn(HEADS, 9), 36),
            RelPosTable(drawn(HEADS, 5), 36, dilation=4),
            RelPosTable(drawn(HEADS, 5, 7), (4, 9), dilation=(1, 2)),
            RelPosTable(drawn(HEADS, 3, 5, 3), (3, 4, 3)),
            RelPosTable(drawn(HEADS, 3, 3), (6, 6)) + ALiBi(HEADS, drawn(BATCH, HEADS)),
        ]
    return [bias.bind(seqlen_q, seqlen_kv) for bias in found]
