"""What FlexAttention takes for a bias: a block mask for its mask, a function for what is added or changed.

A block mask is made without the dense form: the blocks of a `BlockMask` are its own, those of other masks are found by
`tile`, and only the blocks at a mask's borders are evaluated. While a graph is traced, lengths may be symbolic, and
among fake tensors there are no numbers to find: there FlexAttention's own `create_block_mask`, which evaluates all,
takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, BlockMask, Mask, TensorBias
from ..bias.blocks import blocks_of
from ..bias.zero_padded import ZeroPadded
from ..tracing import is_traced
from .dense import additive, of_rank_four

SIZE = 128  #: the fused kernels' blocks divide it


def block_mask_of(mask: Mask, device: torch.device) -> Any:
    """FlexAttention's block mask of a bound mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    rule = mask.rule(device)
    if isinstance(mask, ZeroPadded):  # its rule is that of what it holds
        mask = mask.padded
    if isinstance(mask, BlockMask) and all(size % SIZE == 0 for size in mask.block_size):
        blocks = _of_rank_four(mask.blocks.to(device))
        full = None if mask.within is not None and mask.full is None else blocks
        if mask.full is not None:
            full = blocks & _of_rank_four(mask.full.to(device))
        return _assembled(blocks, full, mask, mask.block_size, rule)
    if numbers_are_unknown():
        seqlen_q, seqlen_kv = mask.bound_lengths()
        batch, num_heads = (None if size == 1 else size for size in mask.batch_and_heads)
        return create_block_mask(rule, batch, num_heads, seqlen_q, seqlen_kv, device=device)
    some, every = blocks_of(mask, (SIZE, SIZE), device)
    return _assembled(some, every, mask, (SIZE, SIZE), rule)


def numbers_are_unknown() -> bool:
    """Whether a graph is traced here, or the tensors that are made are fake."""
    return is_traced() or type(torch.empty(0, device="cpu")) is not Tensor


def _assembled(
    some: Tensor, every: Tensor | None, mask: Mask, block_size: tuple[int, int], rule: Callable[..., Tensor]
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    full: tuple[Tensor | None, Tensor | None] = (None, None)
    if every is not None:
        # As create_block_mask has it: a block that the lengths cut off is never full.
        rows, columns = (
            torch.arange(1, n + 1, device=some.device) * size <= seqlen
            for n, size, seqlen in zip(some.shape[-2:], block_size, mask.bound_lengths())
        )
        every = every & rows[:, None] & columns
        some = some & ~every
        every = every.expand(some.shape)
        full = _in_order(every)
    partial = _in_order(some)
    return FlexBlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=block_size, mask_mod=rule, seq_lengths=mask.bound_lengths()
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(how many of each row are True, their columns and behind them the others)."""
    columns = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), columns.to(torch.int32)


def _of_rank_four(blocks: Tensor) -> Tensor:
    return blocks.reshape((1,) * (4 - blocks.ndim) + tuple(blocks.shape))


def score_mod_of(scores: tuple[AttnBias, ...], softcap: float | Tensor | None = None) -> Callable[..., Tensor] | None:
    """A function of softcap (a number, or a tensor of one), then what is no mask; None where that is nothing."""
    if not scores and softcap is None:
        return None
    written = tuple([_additive(part) if isinstance(part, TensorBias) else part for part in scores])

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = score.float()  # outside a graph it comes in the operands' dtype
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for part in written:
            score = part.score(score, b, h, q, k)
        return score

    return changed


def _additive(bias: TensorBias) -> TensorBias:
    """In float32, as FlexAttention's scores are, whatever the operands."""
    return TensorBias(of_rank_four(additive(bias, torch.float32)), bias.lengths)
