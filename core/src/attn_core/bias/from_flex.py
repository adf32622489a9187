"""From FlexAttention's BlockMask, without importing FlexAttention: that takes a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .block_mask import BlockMask
from .mask_function import MaskMod
from .user_function import name_of


def from_flex_block_mask(flex: Any) -> BlockMask:
    """The same mask: its mask_mod in the blocks that it lists, all of those that it lists as full.

    It is made for the batch and heads that it was created for, and so is its mask_mod: one that varies by b while the
    block mask was made without a batch is refused where it is evaluated. Raises InputError for a slice of a block mask
    (its mask_mod is gone), or for other numbers of blocks than its lengths have.
    """
    if name_of(flex.mask_mod) == "_sliced_mask_mod_error":
        raise InputError(
            "bias: a slice of a flex BlockMask has no mask_mod any more; give the whole, or set mask_mod on the slice"
        )
    seqlen_q, seqlen_kv = flex.seq_lengths
    block_q, block_kv = flex.BLOCK_SIZE
    columns = (seqlen_kv + block_kv - 1) // block_kv
    rows, has = (seqlen_q + block_q - 1) // block_q, flex.kv_indices.shape[-2]
    if has != rows:
        raise InputError(
            f"bias: flex BlockMask has {has} rows of {block_q} queries,"
            f" and its seq_lengths {seqlen_q, seqlen_kv} need {rows}"
        )
    blocks, full = _listed(flex.kv_num_blocks, flex.kv_indices, columns), None
    if flex.full_kv_num_blocks is not None:
        full = _listed(flex.full_kv_num_blocks, flex.full_kv_indices, columns)
        blocks = blocks | full
    within = None
    if not (name_of(flex.mask_mod) == "noop_mask" and flex.mask_mod.__module__ == "torch.nn.attention.flex_attention"):
        batch, num_heads = (None if size == 1 else size for size in (1, 1, *blocks.shape[:-2])[-2:])
        within = MaskMod(flex.mask_mod, (), batch, num_heads)
    made = BlockMask(blocks, (block_q, block_kv), full=full if within is not None else None, within=within)
    return made.bind(seqlen_q, seqlen_kv)


def _listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Boolean `[..., rows, columns]`: True at the first `counts[..., row]` of `indices[..., row, :]`."""
    counted = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    places = torch.where(counted, indices, columns).to(torch.int64)  # the rest goes to a column that is cut off
    listed = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return listed.scatter(-1, places, True)[..., :columns]
