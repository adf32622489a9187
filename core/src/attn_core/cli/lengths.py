"""The lengths that a bias tells by itself, before it is bound: packed documents, a grid, a tensor's shape."""

from __future__ import annotations

from functools import singledispatch
from math import prod

from ..bias import (
    AttnBias,
    BlockMask,
    Cached,
    KeyPadding,
    Neighborhood,
    Paged,
    RelPosTable,
    Segments,
    TensorBias,
)
from ..bias.joint import Joint

Lengths = tuple["int | None", "int | None"]


def told(bias: AttnBias) -> Lengths:
    """(seqlen_q, seqlen_kv) to take where nobody says others: one that alone is told stands for both."""
    seqlen_q, seqlen_kv = lengths_of(bias)
    return seqlen_kv if seqlen_q is None else seqlen_q, seqlen_q if seqlen_kv is None else seqlen_kv


@singledispatch
def lengths_of(bias: AttnBias) -> Lengths:
    """(seqlen_q, seqlen_kv) that the bias was made for, or fits best; None for one that it does not tell."""
    return bias.lengths or (None, None)


@lengths_of.register
def _(bias: Joint) -> Lengths:
    """The first that any of its parts tells: where others differ, `bind` says so."""
    told = [lengths_of(part) for part in bias.parts]
    seqlen_q, seqlen_kv = (next((pair[i] for pair in told if pair[i] is not None), None) for i in (0, 1))
    return seqlen_q, seqlen_kv


@lengths_of.register(Neighborhood)
@lengths_of.register(RelPosTable)
def _(bias: Neighborhood | RelPosTable) -> Lengths:
    return prod(bias.extents), prod(bias.extents)


@lengths_of.register
def _(bias: Segments) -> Lengths:
    ends = [(q1, k1) for _, q1, _, k1 in bias.documents()]
    return bias.lengths or (max((q1 for q1, _ in ends), default=0), max((k1 for _, k1 in ends), default=0))


@lengths_of.register
def _(bias: TensorBias) -> Lengths:
    rows, columns = (1, 1, *bias.tensor.shape)[-2:]
    return bias.lengths or (None if rows == 1 else rows, None if columns == 1 else columns)  # one row fits any


@lengths_of.register
def _(bias: BlockMask) -> Lengths:
    blocks, sizes = bias.blocks.shape[-2:], bias.block_size
    return bias.lengths or (blocks[0] * sizes[0], blocks[1] * sizes[1])


@lengths_of.register
def _(bias: Paged) -> Lengths:
    return bias.lengths or (None, bias.seqlen_kv)


@lengths_of.register
def _(bias: KeyPadding) -> Lengths:
    return bias.lengths or (None, max(bias.seqlens.tolist(), default=None))


@lengths_of.register
def _(bias: Cached) -> Lengths:
    return bias.lengths or (None, max(bias.seqlens_kv.tolist(), default=None))
