"""What is added to the logits of a batch of tiles: a rule, asked for just their rows and columns.

Three levels: `Scores` is what a bias adds, without its tensors; `Added` that of one call, on its batch entries and
heads; `Placed` that of some lanes, whose rows are known tokens. Nothing is kept between calls.

Where all tiles of a run have the same block, it is made once: ALiBi and tables of one axis depend on nothing but how
far a key lies from the query, those of a grid on how far it does so on each axis. In the first case, a block of rows
and columns is made from one line of numbers, of which each row is a part.

On either side of its diagonal, ALiBi is a number for the key and one for the query. The first is a block of one row,
the second only changes the LSE: no block is made. Both count from the query that is next to the keys, so that no
number is larger than what ALiBi adds.

        keys of a tile  ├───────────┼───┼ ─ ─ ─ ┤
        first query     key + 0     │ ╲ │
        next query      key + 1     │  ╲│           the diagonal
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...bias import ALiBi, RelPosTable, Score
from ...bias.diagonal import offset

#: Bytes of what is made on the way to one element of a block, and as much again where autograd keeps it.
ELEMENT_BYTES = 24
#: Bytes of the blocks of a batch of tiles, with what is made on the way.
SCORES_BYTES = 32 << 20
#: Bytes of the block that all tiles of a run share.
SHARED_BYTES = 8 << 20


class Tiles(Protocol):
    """What of a run says where its tiles are."""

    @property
    def q0(self) -> int: ...
    @property
    def k0(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def q_step(self) -> int: ...
    @property
    def k_step(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Scores:
    """What a bias adds, `rules`, and the tensors that these hold, one behind the other."""

    rules: tuple[Score, ...]

    def held(self) -> tuple[Tensor, ...]:
        return tuple(tensor for rule in self.rules for tensor in rule.held().values())

    def of(self, held: Sequence[Tensor]) -> tuple[Score, ...]:
        """The rules, holding these tensors instead."""
        tensors = iter(held)
        return tuple(rule.with_held({name: next(tensors) for name in rule.held()}) for rule in self.rules)

    @property
    def diagonal(self) -> int | None:
        """The key of query 0 that is on the diagonal of all rules, which are ALiBi; None where they have none."""
        found = {offset(rule.corner, *rule.bound_lengths()) for rule in self.rules if type(rule) is ALiBi}
        return found.pop() if len(found) == 1 and all(type(rule) is ALiBi for rule in self.rules) else None

    @property
    def batch(self) -> int:
        return next((n for n in (rule.batch_and_heads[0] for rule in self.rules) if n != 1), 1)


class Gradients:
    """Gradients to the tensors that rules hold, added up tile by tile in a dtype at least as wide as `like`'s.

    `leaves` take the place of those tensors; only those that are `wanted` get a gradient.
    """

    def __init__(self, held: Sequence[Tensor], wanted: Sequence[bool], like: Tensor) -> None:
        self.leaves = [
            tensor.detach().to(torch.promote_types(tensor.dtype, like.dtype)).requires_grad_() if want else tensor
            for tensor, want in zip(held, wanted)
        ]
        self._trained = [leaf for leaf, want in zip(self.leaves, wanted) if want]
        self._given = [tensor for tensor, want in zip(held, wanted) if want]
        self._sums = [torch.zeros_like(leaf) for leaf in self._trained]

    def add(self, block: Tensor, to_logits: Tensor) -> None:
        """Those by `block`, made of the leaves with gradients enabled; `to_logits` is of its shape or larger."""
        if not block.requires_grad:
            return
        found = torch.autograd.grad(block, self._trained, to_logits.sum_to_size(block.shape), allow_unused=True)
        for total, grad in zip(self._sums, found):
            if grad is not None:
                total.add_(grad)

    def results(self) -> tuple[Tensor, ...]:
        """In the dtypes of the tensors."""
        return tuple(total.to(tensor.dtype) for total, tensor in zip(self._sums, self._given))


@dataclass(frozen=True, eq=False)
class Added:
    """What is added in one call of `heads`, in dtype and device of `like`."""

    rules: tuple[Score, ...]
    heads: int
    like: Tensor
    gradients: Gradients | None = None
    diagonal: int | None = None  #: of `Scores`

    def on_sequence(self, seqlen_q: int, seqlen_kv: int, start: int, step: int, entries: range) -> Placed:
        """On every `step`-th token from `start` on, of these batch entries; a lane for each and every head."""
        device = self.like.device
        q, k = (torch.arange(start, length, step, device=device)[None] for length in (seqlen_q, seqlen_kv))
        return Placed(self, q, k, entries, range(self.heads), in_row=step == 1)

    def on_grid(self, q: Tensor, k: Tensor, extents: tuple[int, ...], entries: range, heads: range) -> Placed:
        """On strips of a grid, whose tokens are `[strips, rows]` and `[strips, columns]`; a tile is a box in one."""
        return Placed(self, q, k, entries, heads, extents)


class Beside(NamedTuple):
    """What is added beside the diagonal: the sum of both, the same in all tiles."""

    by_key: Tensor  #: `[1, 1 or lanes, 1, columns]`
    by_query: Tensor  #: `[1, 1 or lanes, rows, 1]`


class Wanted(NamedTuple):
    """Lanes of one rule that differ, and which of them each lane is; None where each is its own, or all are one."""

    strip: Tensor
    b: Tensor
    h: Tensor
    inverse: Tensor | None


@dataclass(frozen=True, eq=False)
class Placed:
    """What is added on `[strips * entries * heads]` lanes, whose rows are the tokens `q` and `k`, `[strips, …]`."""

    added: Added
    q: Tensor
    k: Tensor
    entries: range
    heads: range
    extents: tuple[int, ...] | None = None  #: of the grid, where tiles are boxes
    in_row: bool = False  #: every token is there, from the first on
    lanes: slice = field(default_factory=lambda: slice(None))

    def some(self, lanes: slice) -> Placed:
        return replace(self, lanes=lanes)

    @property
    def gradients(self) -> Gradients | None:
        return self.added.gradients

    def bytes_of(self, tiles: Tiles) -> int:
        """What one tile of one lane takes."""
        return ELEMENT_BYTES * (1 if self.gradients is None else 2) * tiles.rows * tiles.columns

    def same_in(self, tiles: Tiles) -> bool:
        """Whether all of several tiles have one block, small enough to be made beforehand."""
        size = tiles.rows * tiles.columns * self.like.element_size() * len(self.entries) * len(self.heads)
        small = size * self.q.shape[0] <= SHARED_BYTES
        return tiles.count > 1 and small and all(self.same(rule, tiles) for rule in self.added.rules)

    @property
    def like(self) -> Tensor:
        return self.added.like

    def of(self, tiles: Tiles) -> Tensor:
        """`[1 or count, 1 or lanes, rows, columns]`, differentiable in what the rules hold; made anew, so that it may
        be written to."""
        blocks = [self._block(rule, tiles) for rule in self.added.rules]
        total = blocks[0]
        for block in blocks[1:]:
            total = total + block
        shape = (*total.shape[:2], tiles.rows, tiles.columns)
        return total if total.shape == shape else total.expand(shape).contiguous()

    def nearest(self, tiles: Tiles) -> int | None:
        """The query of a tile that is next to its keys, where these lie on one side of the diagonal of all; else
        None."""
        diagonal = self.added.diagonal
        if diagonal is None or not self.in_row or (tiles.count > 1 and tiles.q_step != tiles.k_step):
            return None
        first, last = tiles.q0, tiles.q0 + tiles.rows - 1
        if tiles.k0 + tiles.columns - 1 <= first + diagonal:
            return first
        return last if tiles.k0 >= last + diagonal else None

    def beside(self, tiles: Tiles) -> Beside | None:
        """What is added, where all keys of each tile lie on one side of its queries' diagonal; else None."""
        place, diagonal = self.nearest(tiles), self.added.diagonal
        if place is None or diagonal is None:
            return None
        q, k = self.q[0, tiles.q0 : tiles.q0 + tiles.rows], self.k[0, tiles.k0 : tiles.k0 + tiles.columns]
        nearest = self.q[0, place : place + 1]
        by_key = by_query = torch.zeros((), dtype=self.like.dtype, device=self.like.device)
        for rule in self.added.rules:
            wanted = self.wanted(rule, one_strip=True)
            b, h = wanted.b[:, None], wanted.h[:, None]
            to_key = rule.added(b, h, nearest, k, self.like.dtype)
            to_query = rule.added(b, h, q, nearest + diagonal, self.like.dtype)
            if wanted.inverse is not None:
                to_key, to_query = (x.index_select(0, wanted.inverse) for x in (to_key, to_query))
            by_key, by_query = by_key + to_key, by_query + to_query
        return Beside(by_key[None, :, None], by_query[None, ..., None])

    def same(self, rule: Score, tiles: Tiles) -> bool:
        """Whether what `rule` adds is the same in all tiles and strips."""
        if self.extents is None:
            return is_line(rule) and tiles.q_step == tiles.k_step
        if type(rule) is not RelPosTable or rule.extents != self.extents:
            return False
        steps = torch.arange(tiles.count, device=self.q.device)
        q, k = self.q[:, tiles.q0 + steps * tiles.q_step], self.k[:, tiles.k0 + steps * tiles.k_step]
        for extent in self.extents[::-1]:
            offset = k % extent - q % extent
            if bool((offset != offset[:1, :1]).any()):
                return False
            q, k = q // extent, k // extent
        return True

    def _block(self, rule: Score, tiles: Tiles) -> Tensor:
        same = self.same(rule, tiles)
        wanted = self.wanted(rule, one_strip=same)
        steps = torch.arange(1 if same else tiles.count, device=self.q.device)[:, None]
        rows, columns = (torch.arange(n, device=self.q.device) for n in (tiles.rows, tiles.columns))
        line = self.extents is None and is_line(rule)
        if line:  # from the last query with the first key, over the first with it, to the first with the last key
            along = torch.arange(tiles.rows + tiles.columns - 1, device=self.q.device) - (tiles.rows - 1)
            rows, columns = (-along).clamp(min=0), along.clamp(min=0)
        q = self.q[wanted.strip][:, tiles.q0 + steps * tiles.q_step + rows].transpose(0, 1)  # [steps, lanes, rows]
        k = self.k[wanted.strip][:, tiles.k0 + steps * tiles.k_step + columns].transpose(0, 1)
        b, h = wanted.b[:, None, None], wanted.h[:, None, None]
        q, k = (q[:, :, None] if line else q[..., None]), k[:, :, None]
        block = rule.added(b, h, q, k, self.like.dtype)
        block = block.reshape((1,) * (4 - block.ndim) + tuple(block.shape)).to(self.like)
        if line:
            block = block.expand(*block.shape[:3], tiles.rows + tiles.columns - 1)
            block = block.squeeze(2).unfold(-1, tiles.columns, 1).flip(-2)
        if wanted.inverse is not None and block.shape[1] != 1:
            block = block.index_select(1, wanted.inverse)
        return block

    def wanted(self, rule: Score, one_strip: bool) -> Wanted:
        """The lanes in which a rule is asked: one for each batch entry and head that it tells apart."""
        batches, heads = rule.batch_and_heads
        strips = 1 if one_strip else self.q.shape[0]
        lanes = torch.arange(self.q.shape[0] * len(self.entries) * len(self.heads), device=self.q.device)[self.lanes]
        h = lanes % len(self.heads) + self.heads.start if heads != 1 else torch.zeros_like(lanes)
        b = torch.zeros_like(lanes)
        if batches != 1:
            b = lanes // len(self.heads) % len(self.entries) + self.entries.start
        strip = lanes // (len(self.heads) * len(self.entries)) if strips != 1 else torch.zeros_like(lanes)
        codes, inverse = torch.unique((strip * batches + b) * heads + h, return_inverse=True)
        apart = None if len(codes) in (1, len(lanes)) else inverse
        return Wanted(codes // (heads * batches), codes // heads % batches, codes % heads, apart)


def is_line(rule: Score) -> bool:
    """Whether it depends on the key's place less the query's alone, beside batch entry and head."""
    return type(rule) is ALiBi or (type(rule) is RelPosTable and len(rule.extents) == 1)
