"""Neighborhood attention by its definition, in float64: loops over coordinates, then one product per query and slot.

Slow and obviously right. Everything here is heads-first: `[batch, heads, *extents, dim]`. Gradients are autograd's.

A slot is a place in the last dimension of the weights: the first axis slowest, keys ascending along each axis. Where a
causal axis has fewer keys than the kernel is wide, the keys that exist are in the first slots of that axis.
"""

from __future__ import annotations

from itertools import product
from math import ceil, inf, prod

import torch
from torch import Tensor

MASKED = -1


def neighbors(length: int, kernel: int, dilation: int = 1, stride: int = 1, causal: bool = False) -> list[list[int]]:
    """For each query of one axis the keys that it sees, ascending; fewer than `kernel` on a causal axis' first ones."""
    seen = []
    for i in range(length):
        line, p = i % dilation, i // dilation  # the points line, line + dilation, ... are an axis of their own
        points = ceil((length - line) / dilation)
        if causal:
            leader = min(p // stride * stride + stride - 1, points - 1)
            window = range(max(leader - kernel + 1, 0), p + 1)
        else:
            leader = min(p // stride * stride + stride // 2, points - 1)
            start = min(max(leader - kernel // 2, 0), points - kernel)
            window = range(start, start + kernel)
        seen.append([line + dilation * n for n in window])
    return seen


def each(value, rank: int) -> tuple:
    """One value for each axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def slots(extents, kernel, dilation=1, stride=1, causal=False) -> Tensor:
    """`[prod(extents), prod(kernel)]`: the key, as a flat index, in each slot of each query, or MASKED."""
    rank = len(extents)
    kernel = each(kernel, rank)
    axes = [
        [keys + [None] * (width - len(keys)) for keys in neighbors(*axis)]
        for width, axis in zip(kernel, zip(extents, kernel, *(each(v, rank) for v in (dilation, stride, causal))))
    ]
    table = []
    for query in product(*map(range, extents)):
        row = []
        for key in product(*(axis[i] for axis, i in zip(axes, query))):
            row.append(MASKED if None in key else flat(key, extents))
        table.append(row)
    return torch.tensor(table)


def flat(point, extents) -> int:
    index = 0
    for coordinate, extent in zip(point, extents):
        index = index * extent + coordinate
    return index


def offsets(extents, kernel, dilation=1, stride=1) -> Tensor:
    """`[prod(extents), prod(kernel)]`: the flat index into a table of relative positions, for no causal axis."""
    rank = len(extents)
    kernel, dilation, stride = each(kernel, rank), each(dilation, rank), each(stride, rank)
    sizes = [2 * width - 1 for width in kernel]
    axes = [neighbors(*axis) for axis in zip(extents, kernel, dilation, stride)]
    table = []
    for query in product(*map(range, extents)):
        row = []
        for key in product(*(axis[i] for axis, i in zip(axes, query))):
            entry = [(j - i) // d + width - 1 for i, j, d, width in zip(query, key, dilation, kernel)]
            row.append(flat(entry, sizes))
        table.append(row)
    return torch.tensor(table)


def qk(query, key, kernel, dilation=1, causal=False, stride=1, additional_keys=None, rpb=None) -> Tensor:
    """Weights `[batch, heads, *extents, prod(kernel) + tokens]`, not scaled; -inf in masked slots."""
    batch, heads, *extents, dim = query.shape
    table = slots(extents, kernel, dilation, stride, causal)
    q = query.double().reshape(batch, heads, prod(extents), dim)
    k = key.double().reshape(batch, heads, prod(extents), dim)
    weights = (q.unsqueeze(-2) * k[:, :, table.clamp(min=0)]).sum(-1)
    if rpb is not None:
        weights = weights + rpb.double().flatten(1)[:, offsets(extents, kernel, dilation, stride)]
    weights = weights.masked_fill(table == MASKED, -inf)
    if additional_keys is not None:
        weights = torch.cat([weights, (q.unsqueeze(-2) * additional_keys.double().unsqueeze(-3)).sum(-1)], dim=-1)
    return weights.reshape(batch, heads, *extents, -1)


def av(attn, value, kernel, dilation=1, causal=False, stride=1, additional_values=None) -> Tensor:
    """`[batch, heads, *extents, dim]`; what is in a masked slot does not matter."""
    batch, heads, *extents, dim = value.shape
    table = slots(extents, kernel, dilation, stride, causal)
    weights = attn.double().reshape(batch, heads, prod(extents), -1)
    v = value.double().reshape(batch, heads, prod(extents), dim)
    width = table.shape[1]
    local = weights[..., :width].masked_fill(table == MASKED, 0)
    out = (local.unsqueeze(-1) * v[:, :, table.clamp(min=0)]).sum(-2)
    if additional_values is not None:
        out = out + (weights[..., width:].unsqueeze(-1) * additional_values.double().unsqueeze(-3)).sum(-2)
    return out.reshape(batch, heads, *extents, dim)


def attention(
    query, key, value, kernel, *, stride=1, dilation=1, causal=False, rpb=None, scale=None,
    additional_keys=None, additional_values=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse): `[batch, heads, *extents, dim_v]` and `[batch, heads, *extents]`; each head of key and value serves
    as many consecutive heads of query as there are for one."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        tensor if tensor is None else tensor.repeat_interleave(groups, 1)
        for tensor in (additional_keys, additional_values)
    )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = qk(query.double() * scale, key, kernel, dilation, causal, stride, keys, rpb)
    out = av(weights.softmax(-1), value, kernel, dilation, causal, stride, values)
    return out, weights.logsumexp(-1)
