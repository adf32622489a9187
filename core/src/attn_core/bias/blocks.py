"""Which blocks of a mask have anything to see in them, found without the dense form.

The matrix is halved until `tile` says that a part is empty or full; what remains mixed is a line of single blocks along
the mask's borders, and only those are evaluated, a bounded number at a time.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .base import Mask

CHUNK = 1 << 24  #: pairs that are evaluated at a time


def blocks_of(mask: Mask, block_size: tuple[int, int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(some, every): where a block has a pair that remains, and where all of its pairs do.

    `mask` is bound. Boolean, on `device`, `[batch, num_heads, blocks_q, blocks_kv]` for the batch and heads that the
    mask was made for; the last blocks may be cut off by the lengths.
    """
    seqlen_q, seqlen_kv = mask.bound_lengths()
    rows, columns = -(-seqlen_q // block_size[0]), -(-seqlen_kv // block_size[1])
    full, mixed = _by_tile(mask, block_size, rows, columns)
    certain = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    for i0, i1, j0, j1 in full:
        certain[i0:i1, j0:j1] = True
    some = certain.to(device).repeat(*mask.batch_and_heads, 1, 1)
    every = some.clone()
    batch, num_heads = mask.batch_and_heads
    at_once = max(1, CHUNK // (batch * num_heads * block_size[0] * block_size[1]))
    for first in range(0, len(mixed), at_once):
        places = torch.tensor(mixed[first : first + at_once], device="cpu").to(device)
        i, j = places[:, 0], places[:, 1]
        some[:, :, i, j], every[:, :, i, j] = _evaluated(mask, block_size, i, j)
    return some, every


def _by_tile(
    mask: Mask, block_size: tuple[int, int], rows: int, columns: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int]]]:
    """Ranges of blocks `(i0, i1, j0, j1)` that are full, and the single blocks that are mixed."""
    if type(mask).tile is Mask.tile and type(mask).span is Mask.span:  # it has nothing to say
        return [], list(product(range(rows), range(columns)))
    seqlen_q, seqlen_kv = mask.bound_lengths()
    full, mixed = [], []
    parts = [(0, rows, 0, columns)] if rows and columns else []
    while parts:
        i0, i1, j0, j1 = part = parts.pop()
        queries = i0 * block_size[0], min(i1 * block_size[0], seqlen_q)
        kind = mask.tile(*queries, j0 * block_size[1], min(j1 * block_size[1], seqlen_kv))
        if kind == "full":
            full.append(part)
        elif kind == "mixed":
            i, j = (i0 + i1) // 2, (j0 + j1) // 2
            if i1 - i0 >= j1 - j0 > 0 and i1 - i0 > 1:
                parts += [(i0, i, j0, j1), (i, i1, j0, j1)]
            elif j1 - j0 > 1:
                parts += [(i0, i1, j0, j), (i0, i1, j, j1)]
            else:
                mixed.append((i0, j0))
    return full, mixed


def _evaluated(mask: Mask, block_size: tuple[int, int], i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """(some, every), `[batch, num_heads, n]`, of the blocks at row `i[n]` and column `j[n]`."""
    (batch, num_heads), (seqlen_q, seqlen_kv) = mask.batch_and_heads, mask.bound_lengths()
    q = (i[:, None] * block_size[0] + torch.arange(block_size[0], device=i.device))[:, :, None]
    k = (j[:, None] * block_size[1] + torch.arange(block_size[1], device=i.device))[:, None, :]
    b = torch.arange(batch, device=i.device)[:, None, None, None, None]
    h = torch.arange(num_heads, device=i.device)[:, None, None, None]
    exists = (q < seqlen_q) & (k < seqlen_kv)
    kept = mask.keep(b, h, q.clamp(max=seqlen_q - 1), k.clamp(max=seqlen_kv - 1))
    kept = kept.expand(batch, num_heads, len(i), *block_size)
    return (kept & exists).flatten(-2).any(-1), (kept | ~exists).flatten(-2).all(-1)
