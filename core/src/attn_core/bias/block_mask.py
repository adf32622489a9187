"""BlockMask: queries and keys in blocks, and a boolean for each pair of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import AttnBias, Mask, Rule, TileKind, _is_tracing
from .block_rows import Rows, has_all, rows_of
from .blocks import blocks_of
from .fields import look, on_meta
from .whole_numbers import as_int, is_count

#: Of the blocks, where they can be read without waiting: (share of them that is True, whether all are, whether none is
#: left to `within`). A part of the key, the share to the nearest power of 2, so that choices may depend on it.
Census = tuple["float | None", bool, bool]

UNREAD: Census = (None, False, False)


@dataclass(frozen=True, repr=False, eq=False, init=False)
class BlockMask(Mask):
    """Queries of block i see keys of block j where `blocks[..., i, j]`; `within` them another mask may say which.

    Args:
        blocks: boolean, `[batch, num_heads, ceil(seqlen_q / block_q), ceil(seqlen_kv / block_kv)]` or of lower rank,
            at least 2; batch and num_heads may be 1 for any. On any device: where a GPU's, its values are copied once
            where a kernel asks what it may skip.
        block_size: queries and keys of a block, each >= 1: an int, or `(block_q, block_kv)`. The last blocks end with
            the sequence.
        full: boolean, as `blocks`: blocks that are seen whole, so that `within` need not be asked. It counts where
            `blocks` is True. Only together with `within`.
        within: a mask that holds within the blocks that are not full. None: all are seen whole. Keys that are padding
            by it are padding here too, but for those that a full block sees.

        BlockMask(torch.tensor([[1, 0], [1, 1]]).bool(), (2, 3), within=Causal("top-left")) on 4 x 5
        █····
        ██···
        ███··
        ████·

    Raises InputTypeError for tensors that are not boolean or a `within` that is no mask, InputError for another rank,
    sizes that do not go together or blocks below 1; when bound, for lengths of another number of blocks.
    """

    blocks: Tensor
    block_size: tuple[int, int]
    full: Tensor | None
    within: Mask | None
    lengths: tuple[int, int] | None = None
    census: Census = field(init=False, default=UNREAD)

    def __init__(
        self,
        blocks: Tensor,
        block_size: int | Sequence[int],
        *,
        full: Tensor | None = None,
        within: Mask | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        sizes = _sizes(block_size)
        _check(blocks, full, within)
        self._set(blocks, sizes, full, within, lengths, None)

    def _set(
        self,
        blocks: Tensor,
        block_size: tuple[int, int],
        full: Tensor | None,
        within: Mask | None,
        lengths: tuple[int, int] | None,
        census: Census | None,
    ) -> None:
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "full", full)
        object.__setattr__(self, "within", within)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "census", census or _census(blocks, full, within))
        object.__setattr__(self, "_table", None)

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        seqlen_q: int,
        seqlen_kv: int,
        block_size: int | Sequence[int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """`mask` itself, with its blocks looked at once: for a mask that is dear to evaluate and used many times.

        `device`: where the blocks lie; default that of the mask's tensors, or the CPU. The dense form is never made.
        What a function captures must not change afterwards. Raises what `bind` and the mask's rule raise.
        """
        if not isinstance(mask, Mask):
            raise InputTypeError(f"BlockMask.from_mask: takes a mask, got {type(mask).__name__}")
        sizes, bound = _sizes(block_size), mask.bind(seqlen_q, seqlen_kv)
        some, every = blocks_of(bound, sizes, device or bound.device or "cpu")
        return cls(some, sizes, full=every, within=bound, lengths=bound.lengths)

    def __repr__(self) -> str:
        share = self.census[0]
        seen = "" if share is None else f", {share:.0%} True"
        size = self.block_size[0] if self.block_size[0] == self.block_size[1] else self.block_size
        text = f"BlockMask({list(self.blocks.shape)}{seen}, {size}"
        text += f"{'' if self.full is None else ', full'}{'' if self.within is None else f', within={self.within!r}'})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    def __eq__(self, other: object) -> bool:
        if type(other) is not BlockMask:
            return NotImplemented
        return self.within == other.within and super().__eq__(other)

    __hash__ = Mask.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.blocks, self.block_size, self.full, self.within, self.lengths)

    def _with(self, **changes: Any) -> BlockMask:
        names = ("blocks", "block_size", "full", "within", "lengths", "census")
        return _made(*(changes.get(name, getattr(self, name)) for name in names))

    # A value that holds data

    @property
    def key(self) -> tuple[object, ...]:
        share, every, unasked = self.census
        level = None if not share else round(-log2(share))
        inner = None if self.within is None else self.within.key
        full = None if self.full is None else look(self.full)
        return BlockMask, look(self.blocks), self.block_size, full, inner, level, every, unasked, self.lengths

    @property
    def holds_data(self) -> bool:
        return True

    def held(self) -> dict[str, Tensor]:
        held = {"blocks": self.blocks} if self.full is None else {"blocks": self.blocks, "full": self.full}
        inner = {} if self.within is None else self.within.held()
        return held | {f"within.{name}": tensor for name, tensor in inner.items()}

    def with_held(self, tensors: dict[str, Tensor]) -> BlockMask:
        inner = {name.removeprefix("within."): x for name, x in tensors.items() if name.startswith("within.")}
        within = self.within.with_held(inner) if self.within is not None and inner else self.within
        full = None if self.full is None else tensors.get("full", self.full)
        return _made(tensors.get("blocks", self.blocks), self.block_size, full, within, self.lengths)

    def without_data(self) -> BlockMask:
        full = None if self.full is None else on_meta(self.full)
        within = None if self.within is None else self.within.without_data()
        return self._with(blocks=on_meta(self.blocks), full=full, within=within)

    @property
    def device(self) -> torch.device | None:
        """That of `within`: the blocks are few, and go where they are needed."""
        return None if self.within is None else self.within.device

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        sizes = [(_size(x, -4), _size(x, -3)) for x in (self.blocks, self.full) if x is not None]
        sizes += [] if self.within is None else [self.within.batch_and_heads]
        return max([batch for batch, _ in sizes]), max([heads for _, heads in sizes])

    def bind(self, seqlen_q: int, seqlen_kv: int) -> BlockMask:
        self._check_rebind(seqlen_q, seqlen_kv)
        named = ("seqlen_q", "seqlen_kv")
        for name, seqlen, size, has in zip(named, (seqlen_q, seqlen_kv), self.block_size, self.blocks.shape[-2:]):
            if (seqlen + size - 1) // size != has:
                raise InputError(
                    f"bias: {self!r} has {has} blocks of {size} on {name}, for {max(0, (has - 1) * size + 1)} to"
                    f" {has * size}, got {name}={seqlen}"
                )
        return self._with(
            lengths=(seqlen_q, seqlen_kv), within=None if self.within is None else self.within.bind(seqlen_q, seqlen_kv)
        )

    def at(self, lengths: tuple[int, int]) -> BlockMask:
        return self._with(lengths=lengths, within=None if self.within is None else self.within.at(lengths))

    def facts(self) -> tuple[Any, ...]:
        inner = None if self.within is None else (type(self.within), self.within.facts())
        return self.block_size, self.full is not None, inner

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> BlockMask:
        block_size, has_full, inner = facts
        shape = batch, num_heads, *(-(-seqlen // size) for seqlen, size in zip(lengths, block_size))
        blocks = torch.empty(shape, dtype=torch.bool, device="meta")
        within = None if inner is None else inner[0].from_facts(inner[1], batch, num_heads, lengths)
        return _made(blocks, block_size, blocks if has_full else None, within, lengths)

    # The rule, and what follows from it

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        within = None if self.within is None else self.within.keep(b, h, q, k)
        return self._kept(self.blocks.to(q.device), _moved(self.full, q.device), within, b, h, q, k)

    def rule(self, device: torch.device | str) -> Rule:
        blocks, full = self.blocks.to(device), _moved(self.full, device)
        inner = None if self.within is None else self.within.rule(device)

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self._kept(blocks, full, None if inner is None else inner(b, h, q, k), b, h, q, k)

        return keep

    def _kept(
        self, blocks: Tensor, full: Tensor | None, within: Tensor | None, b: Tensor, h: Tensor, q: Tensor, k: Tensor
    ) -> Tensor:
        i, j = q // self.block_size[0], k // self.block_size[1]
        if within is not None:
            within = within if full is None else within | _entry(full, b, h, i, j)
        kept = _entry(blocks, b, h, i, j)
        return kept if within is None else kept & within

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        rows = self._rows()
        if rows is None or q0 >= q1:
            return 0, self.bound_lengths()[1]
        seen, whole = rows.within(q0 // self.block_size[0], -(-q1 // self.block_size[0])).columns()
        first, last = self._keys(seen)
        if self.within is not None:
            inner = self.within.span(q0, q1)
            first, last = max(first, inner[0]), min(last, inner[1])
            if whole:  # seen in some batch entry or head without asking
                unasked = self._keys(whole)
                first, last = (min(first, unasked[0]), max(last, unasked[1])) if first < last else unasked
        return (first, last) if first < last else (0, 0)

    def _keys(self, columns: int) -> tuple[int, int]:
        """The first key of the first of these blocks, and the one behind the last of the last."""
        size, seqlen_kv = self.block_size[1], self.bound_lengths()[1]
        first = (columns & -columns).bit_length() - 1
        return (first * size, min(columns.bit_length() * size, seqlen_kv)) if columns else (0, 0)

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        every = self._rows()
        if every is None or q0 >= q1 or k0 >= k1:
            return "mixed"
        block_q, block_kv = self.block_size
        rows = every.within(q0 // block_q, -(-q1 // block_q))
        asked = (1 << -(-k1 // block_kv)) - (1 << (k0 // block_kv))
        seen, whole = rows.columns()
        if not seen & asked:
            return "empty"
        if has_all(rows.whole_in_all, asked):
            return "full"
        inner: TileKind = "full" if self.within is None else self.within.tile(q0, q1, k0, k1)
        if inner == "empty" and not whole & asked:
            return "empty"
        return "full" if inner == "full" and has_all(rows.seen_in_all, asked) else "mixed"

    def _rows(self) -> Rows | None:
        """None where there are no values."""
        if self.blocks.is_meta or _is_tracing() or type(self.blocks) is not Tensor:
            return None
        if self._table is None:
            object.__setattr__(self, "_table", rows_of(self.blocks, self.full))
        return self._table

    _table = None  # read once, where it is asked for

    def pairs(self) -> float:
        share = self.census[0]
        seqlen_q, seqlen_kv = self.bound_lengths()
        left = float(seqlen_q) * float(seqlen_kv)
        left = left if share is None else left * share
        return left if self.within is None or self.full is not None else min(left, self.within.pairs())

    @property
    def has_padding(self) -> bool:
        return self.within is not None and self.within.has_padding

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor | None:
        valid = None if self.within is None else self.within.valid_keys(device)
        if valid is None or self.full is None:
            return valid
        whole = self.blocks & self.full  # where `within` is not asked, keys exist
        columns = whole.reshape((1,) * (4 - whole.ndim) + tuple(whole.shape)).any(1).any(1).to(valid.device)
        return valid | columns.repeat_interleave(self.block_size[1], 1)[:, : valid.shape[1]]

    def normalize(self) -> AttnBias | None:
        _, every, unasked = self.census
        within = None if self.within is None else self.within.normalize()
        if self.within is None or within is None or (unasked and not within.has_padding):
            if every:
                return None
            return self if self.within is None else _made(self.blocks, self.block_size, None, None, self.lengths)
        if every and self.full is None:
            return within
        return self if within is self.within else self._with(within=within)


def _sizes(block_size: Any) -> tuple[int, int]:
    """(queries, keys) of a block."""
    sizes = tuple(map(as_int, block_size if isinstance(block_size, Sequence) else (block_size,) * 2))
    if len(sizes) != 2 or not all(is_count(size, 1) for size in sizes):
        raise InputError(
            f"BlockMask: block_size must be an int >= 1, or one of queries and of keys, got {block_size!r}"
        )
    return sizes


def _check(blocks: Any, full: Any, within: Any) -> None:
    for name, tensor in (("blocks", blocks), ("full", full)):
        if tensor is None and name == "full":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype is not torch.bool:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputTypeError(f"BlockMask: {name} must be a boolean tensor, got {got}")
        if not 2 <= tensor.ndim <= 4:
            raise InputError(
                f"BlockMask: {name} must be [batch, num_heads, blocks_q, blocks_kv], or without the first one or"
                f" two, got shape {list(tensor.shape)}"
            )
    if within is not None and not isinstance(within, Mask):
        raise InputTypeError(f"BlockMask: within takes a mask, got {type(within).__name__}")
    if full is not None:
        if within is None:
            raise InputError("BlockMask: full says where `within` need not be asked, and there is none")
        if full.shape[-2:] != blocks.shape[-2:] or full.device != blocks.device:
            raise InputError(
                f"BlockMask: full must have the {_by(blocks)} blocks of `blocks`, on its device {blocks.device},"
                f" got {_by(full)} on {full.device}"
            )
    for axis, name in ((-4, "batch"), (-3, "num_heads")):
        inner = () if within is None else within.batch_and_heads[axis + 4 : axis + 5]
        made_for = {*inner, *(_size(tensor, axis) for tensor in (blocks, full) if tensor is not None)} - {1}
        if len(made_for) > 1:
            raise InputError(f"BlockMask: made for {name}={' and '.join(map(str, sorted(made_for)))}")


def _made(
    blocks: Tensor,
    block_size: tuple[int, int],
    full: Tensor | None,
    within: Mask | None,
    lengths: tuple[int, int] | None,
    census: Census | None = None,
) -> BlockMask:
    """One of values that were checked before."""
    bias = object.__new__(BlockMask)
    bias._set(blocks, block_size, full, within, lengths, census)
    return bias


def _census(blocks: Tensor, full: Tensor | None, within: Mask | None) -> Census:
    """What is known of the blocks where reading them waits for nothing."""
    if _is_tracing() or type(blocks) is not Tensor or blocks.device.type != "cpu" or not blocks.numel():
        return UNREAD
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return UNREAD
    unasked = within is None or (full is not None and bool((full | ~blocks).all()))
    share = float(blocks.count_nonzero()) / blocks.numel()
    return share, share == 1.0, unasked


def _size(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if tensor.ndim >= -axis else 1


def _by(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]} x {tensor.shape[-1]}"


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _entry(table: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`table[b, h, i, j]`; what it ignores leaves that dimension out."""
    if table.ndim == 2 or (table.ndim == 3 and table.shape[0] == 1) or table.shape[:-2] == (1, 1):
        return table.reshape(table.shape[-2:])[i, j]
    if table.ndim == 3 or table.shape[0] == 1:
        return table.reshape(table.shape[-3:])[h, i, j]
    return table[:, 0][b, i, j] if table.shape[1] == 1 else table[b, h, i, j]
