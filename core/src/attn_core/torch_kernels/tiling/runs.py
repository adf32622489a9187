"""Runs: tiles of one shape at even distances, read from overlapping views and handed to a dense kernel in batches.

The keys of neighbouring tiles overlap, so a batch of them is a view with a stride smaller than its extent: nothing is
gathered or padded. The gradients of overlapping keys are added up in strips no wider than that stride, which do not
overlap; each strip is one strided addition.

        keys of tile 0  ├──────────┤
        keys of tile 1      ├──────────┤           a strip:  ├──┤├──┤├──┤
        keys of tile 2          ├──────────┤

Here a *lane* is one sequence of rows: `[lanes, seqlen, dim]`, batch entries, heads and whatever else in one dimension.
Query lane n reads key lane `n // (lanes // kv_lanes)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import dense
from .scores import SCORES_BYTES, Added, Beside, Placed

MASKED = dense.MASKED

#: Bytes of a batch of tiles: what a dense kernel returns for it, before that is put where it belongs. Small enough
#: for the caches, and large enough for all threads to find work.
FORWARD_BYTES = 1 << 20
BACKWARD_BYTES = 4 << 20
#: Bytes of what is made on the way to one element of a mask.
RULE_BYTES = 16


class Rule(Protocol):
    """Makes the mask of tiles when it is needed, where those of all would be too large to keep."""

    def of(self, run: Run) -> Tensor:
        """Additive, `[count, 1 or lanes, rows, columns]`."""
        ...


class Run(NamedTuple):
    """`count` tiles; tile i has `rows` queries from `q0 + i * q_step` on, and `columns` keys from `k0 + i * k_step` on.

    `mask` is additive, `[1 or count, 1 or lanes, rows, columns]`, or a rule that makes one for some of the tiles; None:
    every pair remains. `causal`: query i of a tile sees its keys up to i. `more`: other runs have these queries, too,
    so that results are joined.
    """

    q0: int
    k0: int
    rows: int
    columns: int
    count: int = 1  # type: ignore[assignment]  # not tuple's
    q_step: int = 0
    k_step: int = 0
    mask: Tensor | Rule | None = None
    causal: bool = False
    empty_rows: bool = False  #: the mask leaves some queries without a key
    more: bool = False
    batch_bytes: int | None = None  #: bound of a batch of tiles; None: that of the direction


class Operands(NamedTuple):
    """What a call works on: `[batch, heads, seqlen, dim]`, and `[batch, heads, seqlen]` for the LSE."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    scores: Added | None = None  #: what is added to the logits


class Lanes(NamedTuple):
    """The same of some heads, as sequences: `[lanes, seqlen, dim]`, and `[lanes, seqlen]` for the LSE."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    scores: Placed | None = None  #: what is added to the logits


class Grads(NamedTuple):
    """Gradients to be filled in beside `Lanes`; `out` is the one given, the others are added to."""

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def forward(runs: Sequence[Run], lanes: Lanes) -> None:
    """Fills `out` and `lse` in. Queries that no run has are left as they are."""
    dim = lanes.query.shape[2] * lanes.query.element_size()
    for whole in runs:
        run, of_run = _with_scores(whole, lanes)
        for batch, part in _batches(run, of_run, run.rows * dim, run.batch_bytes or FORWARD_BYTES):
            beside = _beside(batch, part)
            mask = _mask(batch, part) if beside is None else beside.by_key
            query, key, value = _queries(batch, part.query), _keys(batch, part.key), _keys(batch, part.value)
            out, lse = dense.forward(query, key, value, mask, batch.causal, part.scale)
            if beside is not None:
                lse = lse + beside.by_query.squeeze(-1)
            if batch.empty_rows:
                assert mask is not None
                lse = lse.masked_fill((mask == MASKED).all(-1), MASKED)
            to_out, to_lse = _queries(batch, part.out), _queries(batch, part.lse.unsqueeze(-1)).squeeze(-1)
            if batch.more:
                _join(to_out, to_lse, out, lse)
            else:
                to_out.copy_(out)
                to_lse.copy_(lse)


def _join(to_out: Tensor, to_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Attention over the keys so far and over these."""
    joined = torch.logaddexp(to_lse, lse)
    finite = joined.masked_fill(joined == MASKED, 0.0)  # -inf where neither has a key
    to_out.mul_(torch.exp(to_lse - finite).unsqueeze(-1)).add_(out * torch.exp(lse - finite).unsqueeze(-1))
    to_lse.copy_(joined)


def backward(runs: Sequence[Run], lanes: Lanes, grads: Grads) -> None:
    """Adds to the gradients. `lanes.lse` is finite."""
    dim = lanes.query.shape[2] * lanes.query.element_size()
    for whole in runs:
        run, of_run = _with_scores(whole, lanes)
        tile_bytes, bound = (run.rows + 2 * run.columns) * dim, run.batch_bytes or BACKWARD_BYTES
        for batch, part, grad in _batches_with(run, of_run, grads, tile_bytes, bound):
            query, key, value = _queries(batch, part.query), _keys(batch, part.key), _keys(batch, part.value)
            lse = _queries(batch, part.lse.unsqueeze(-1)).squeeze(-1)
            operands = _queries(batch, grad.out), query, key, value, _queries(batch, part.out)
            gradients = None if part.scores is None else part.scores.gradients
            with torch.set_grad_enabled(gradients is not None):
                beside = _beside(batch, part)
            if beside is not None:
                lse = lse - beside.by_query.detach().squeeze(-1)
            if gradients is None:
                mask = _mask(batch, part) if beside is None else beside.by_key
                to_query, to_key, to_value = dense.backward(*operands, lse, mask, batch.causal, part.scale)
            else:  # the fused kernels give no gradient to what is added
                assert part.scores is not None
                if beside is None:
                    with torch.enable_grad():
                        block = part.scores.of(batch)
                    mask = _masked(batch, block.detach().clone())
                else:
                    mask = beside.by_key.detach()
                grad_out, query, key, value, out = (x.to(lse.dtype) for x in operands)
                to_query, to_key, to_value, to_scores = dense.backward_with_logits(
                    grad_out, query, key, value, out, lse, mask, False, part.scale
                )
                if beside is None:
                    gradients.add(block, to_scores)
                else:
                    gradients.add(beside.by_key, to_scores)
                    gradients.add(beside.by_query, to_scores)
            if batch.more:
                _queries(batch, grad.query).add_(to_query)
            else:
                _queries(batch, grad.query).copy_(to_query)
            _add_keys(batch, grad.key, to_key)
            _add_keys(batch, grad.value, to_value)


def _mask(run: Run, lanes: Lanes) -> Tensor | None:
    if lanes.scores is not None:
        return _masked(run, lanes.scores.of(run))
    return run.mask if run.mask is None or isinstance(run.mask, Tensor) else run.mask.of(run)


def _beside(run: Run, lanes: Lanes) -> Beside | None:
    """What is added, where that is no block of numbers; None where it is one, or nothing."""
    return None if lanes.scores is None or run.mask is not None else lanes.scores.beside(run)


def _masked(run: Run, block: Tensor) -> Tensor:
    """What is added to the logits of the tiles, less what is masked; may write to `block`."""
    if run.mask is None:
        return block
    if isinstance(run.mask, Tensor):
        return block + run.mask
    return run.mask.onto(block) if isinstance(run.mask, Diagonal) else block + run.mask.of(run)


def _with_scores(run: Run, lanes: Lanes) -> tuple[Run, Lanes]:
    """With what is added in its mask, where that is the same for all tiles and no gradient is wanted."""
    scores = lanes.scores
    if scores is None or scores.gradients is not None or not (run.mask is None or isinstance(run.mask, Tensor)):
        return run, lanes
    if not scores.same_in(run):
        return run, lanes
    return run._replace(mask=_masked(run, scores.of(run))), lanes._replace(scores=None)


def _queries(run: Run, lanes: Tensor) -> Tensor:
    """`[count, lanes, rows, dim]`"""
    by_lane, by_row, by_dim = lanes.stride()
    return lanes.as_strided(
        (run.count, lanes.shape[0], run.rows, lanes.shape[2]),
        (run.q_step * by_row, by_lane, by_row, by_dim),
        lanes.storage_offset() + run.q0 * by_row,
    )


def _keys(run: Run, lanes: Tensor, first: int = 0, columns: int | None = None) -> Tensor:
    """`[count, lanes, columns, dim]`; of each tile the columns from `first` on."""
    by_lane, by_row, by_dim = lanes.stride()
    return lanes.as_strided(
        (run.count, lanes.shape[0], run.columns if columns is None else columns, lanes.shape[2]),
        (run.k_step * by_row, by_lane, by_row, by_dim),
        lanes.storage_offset() + (run.k0 + first) * by_row,
    )


def _add_keys(run: Run, lanes: Tensor, grad: Tensor) -> None:
    """Adds gradients of the keys of each tile, in strips that do not overlap."""
    if run.count == 1:
        _keys(run, lanes).add_(grad)
    elif run.k_step == 0:
        _keys(run._replace(count=1), lanes).add_(grad.sum(0, keepdim=True))
    else:
        for first in range(0, run.columns, run.k_step):
            columns = min(run.k_step, run.columns - first)
            _keys(run, lanes, first, columns).add_(grad[:, :, first : first + columns])


def _batches(run: Run, lanes: Lanes, tile_bytes: int, bound: int) -> Iterator[tuple[Run, Lanes]]:
    """The run in parts whose results fit in `bound`; by tiles, and where one tile is too large, by lanes."""
    for tiles, query_lanes, key_lanes in cuts(run, lanes, tile_bytes, bound):
        yield _some_tiles(run, tiles, query_lanes), _some_lanes(lanes, query_lanes, key_lanes)


def _batches_with(
    run: Run, lanes: Lanes, grads: Grads, tile_bytes: int, bound: int
) -> Iterator[tuple[Run, Lanes, Grads]]:
    for tiles, query_lanes, key_lanes in cuts(run, lanes, tile_bytes, bound):
        part = grads
        if query_lanes is not None:
            part = Grads(*(x[query_lanes] for x in grads[:2]), *(x[key_lanes] for x in grads[2:]))
        yield _some_tiles(run, tiles, query_lanes), _some_lanes(lanes, query_lanes, key_lanes), part


Cut = tuple["tuple[int, int] | None", "slice | None", "slice | None"]


def cuts(run: Run, lanes: Lanes, tile_bytes: int, bound: int) -> Iterator[Cut]:
    """(range of tiles, slices of query and of key lanes); None where that is all of them."""
    num_lanes, num_key_lanes = lanes.query.shape[0], lanes.key.shape[0]
    group = num_lanes // num_key_lanes
    if run.mask is not None and not isinstance(run.mask, Tensor):  # which is made together with the results
        tile_bytes += RULE_BYTES * run.rows * run.columns // num_lanes
    if lanes.scores is not None:  # whose bound is another
        tile_bytes = max(tile_bytes, lanes.scores.bytes_of(run) * bound // SCORES_BYTES)
    tiles = bound // (tile_bytes * num_lanes)
    if tiles >= run.count:
        yield None, None, None
    elif tiles >= 1:
        # Equally many tiles in each batch, rather than a small one at the end.
        batches = -(-run.count // tiles)
        tiles = -(-run.count // batches)
        for first in range(0, run.count, tiles):
            yield (first, min(first + tiles, run.count)), None, None
    else:
        step = max(1, bound // (tile_bytes * group))
        for first in range(0, num_key_lanes, step):
            end = min(first + step, num_key_lanes)
            for tile in range(run.count):
                yield (tile, tile + 1), slice(first * group, end * group), slice(first, end)


def _some_tiles(run: Run, tiles: tuple[int, int] | None, lanes: slice | None) -> Run:
    mask = run.mask
    if tiles is None:
        return run
    first, end = tiles
    if isinstance(mask, Tensor):
        if lanes is not None and mask.shape[1] != 1:
            mask = mask[:, lanes]
        if mask.shape[0] != 1:
            mask = mask[first:end]
    elif mask is not None and lanes is not None:
        mask = SomeLanes(mask, lanes)
    return run._replace(q0=run.q0 + first * run.q_step, k0=run.k0 + first * run.k_step, count=end - first, mask=mask)


class SomeLanes(NamedTuple):
    """A rule, of which some lanes are wanted."""

    rule: Rule
    lanes: slice

    def of(self, run: Run) -> Tensor:
        mask = self.rule.of(run)
        return mask if mask.shape[1] == 1 else mask[:, self.lanes]


class Diagonal(NamedTuple):
    """Row i of a tile sees its keys up to `first + i`; `like` has dtype and device of what is added."""

    first: int
    like: Tensor

    def of(self, run: Run) -> Tensor:
        """`[1, 1, rows, columns]`"""
        return self.onto(torch.zeros(1, 1, run.rows, run.columns, dtype=self.like.dtype, device=self.like.device))

    def onto(self, block: Tensor) -> Tensor:
        """Masks the last two dimensions of a block, in place; the columns that all rows see are not read."""
        corner = block[..., self.first :]
        hidden = torch.ones(corner.shape[-2:], dtype=torch.bool, device=block.device).triu(1)
        corner.masked_fill_(hidden, MASKED)
        return block


def _some_lanes(lanes: Lanes, queries: slice | None, keys: slice | None) -> Lanes:
    if queries is None:
        return lanes
    query, key, value, out, lse, scale, scores = lanes
    some = None if scores is None else scores.some(queries)
    return Lanes(query[queries], key[keys], value[keys], out[queries], lse[queries], scale, some)
