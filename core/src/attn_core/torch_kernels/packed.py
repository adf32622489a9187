"""Sequences of their own lengths as FlashAttention takes them: one behind the other, found by where each starts.

The op is told upper bounds of their lengths, and draws conclusions from them:
- Limits of a window are compared with `max_kv` (see `flash_limits`), so that must not lie below `max_q`.
- Where `max_q` is 1 it folds heads into queries, and takes for granted that each sequence has one; where some sequence
  has none, 2 is said instead.
What lies on a device is not looked at before: lengths and pages are clamped, so that wrong ones read no other memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bias import AttnBias, Cached, KeyPadding, Paged, Segments
from ..bias.documents import unpack
from ..bias.segments import band_of
from ..tracing import constant, is_traced
from .dense import MASKED
from .flash_limits import limits


@dataclass(frozen=True)
class Packed:
    """What the op is told beside its operands."""

    starts_q: Tensor  #: int32 `[sequences + 1]`: the first query of each, and the end of the last
    starts_kv: Tensor  #: the same of keys
    max_q: int
    max_kv: int
    window: tuple[int, int] = (-1, -1)  #: on each sequence's own diagonal, from its bottom right
    used_kv: Tensor | None = None  #: int32 `[sequences]`: so many of its keys exist; None: all up to the next start
    pages: Tensor | None = None  #: int32 `[sequences, max_pages]`


def packed(bias: AttnBias | None, query: Tensor, key: Tensor) -> Packed:
    """How `query` and `key`, `[batch, seqlen, num_heads, head_dim]` or key in pages, are told to the op.

    `bias` is bound: None, Segments, KeyPadding, Cached or Paged.
    """
    device, batch, seqlen_q = query.device, query.shape[0], query.shape[1]
    seqlen_kv = key.shape[1] if bias is None else bias.bound_lengths()[1]
    if isinstance(bias, Segments):
        return _of_documents(bias, batch, seqlen_q, seqlen_kv, device)
    each = Packed(_one_each(batch, seqlen_q, device), _one_each(batch, seqlen_kv, device), seqlen_q, seqlen_kv)
    if bias is None:
        return each
    assert isinstance(bias, (KeyPadding, Cached, Paged))
    if isinstance(bias, KeyPadding):
        seqlens, window = bias.seqlens, (-1, -1)
    else:
        seqlens, window = bias.seqlens_kv, limits(band_of(bias.within))
    each = replace(each, used_kv=seqlens.to(device).clamp(0, seqlen_kv).to(torch.int32).contiguous(), window=window)
    if is_a_window(window):
        each = replace(each, max_kv=torch.sym_max(seqlen_kv, seqlen_q))  # type: ignore[no-untyped-call]
    if isinstance(bias, Paged):
        last = key.shape[0] - 1
        each = replace(each, pages=bias.page_table.to(device).clamp(0, last).to(torch.int32).contiguous())
    return each


def is_a_window(window: tuple[int, int]) -> bool:
    """Whether it has limits, and is not causal alone."""
    return window not in ((-1, -1), (-1, 0))


def together(key: Tensor, value: Tensor, valid: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """The keys and values that exist, behind each other, and zeros for the rest: `[batch * seqlen_kv, …]` as before.

    `valid` is `[batch or 1, seqlen_kv]`. How many exist is not asked for, so a device is not waited for.
    """
    assert valid is not None
    exists = valid.expand(batch, -1).flatten()
    order = exists.logical_not().to(torch.uint8).argsort(stable=True)
    exists = exists.index_select(0, order)[:, None, None]
    key, value = (torch.where(exists, tensor.index_select(0, order), 0) for tensor in (key, value))
    return key, value


def behind_each_other(told: Packed) -> Packed:
    """The same of keys that were put together."""
    assert told.used_kv is not None
    ends = told.used_kv.cumsum(0, dtype=torch.int32)
    return replace(told, starts_kv=torch.cat([ends.new_zeros(1), ends]), used_kv=None)


def flat(tensor: Tensor) -> Tensor:
    """`[batch * seqlen, num_heads, head_dim]` of `[batch, seqlen, num_heads, head_dim]`: a view where strides allow."""
    return tensor.flatten(0, 1)


def of_entries(tensor: Tensor, batch: int) -> Tensor:
    """`[batch, seqlen, num_heads, head_dim]` of `[batch * seqlen, num_heads, head_dim]`."""
    return tensor.reshape(batch, -1, *tensor.shape[1:])


def lse_of_entries(lse: Tensor, batch: int) -> Tensor:
    """`[batch, num_heads, seqlen_q]` of `[num_heads, batch * seqlen_q]`."""
    return lse.reshape(lse.shape[0], batch, -1).transpose(0, 1)


def normalized(lse: Tensor) -> Tensor:
    """The op reports +inf for a query that sees no key: -inf, as everywhere."""
    return lse.masked_fill(lse == float("inf"), MASKED)


def _one_each(batch: int, seqlen: int, device: torch.device) -> Tensor:
    """Starts of sequences of one length."""
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * seqlen


def _of_documents(bias: Segments, batch: int, seqlen_q: int, seqlen_kv: int, device: torch.device) -> Packed:
    """Every batch entry has the same documents."""
    bias = bias.from_bottom_right() or bias
    make = _made if is_traced() or torch._C._len_torch_dispatch_stack() else _kept
    return make(bias.packed, bias.has_gaps, limits(band_of(bias.within)), batch, seqlen_q, seqlen_kv, device)


def _made(
    documents: bytes,
    has_gaps: bool,
    window: tuple[int, int],
    batch: int,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
) -> Packed:
    starts_q, starts_kv, seqlens_kv, max_q, max_kv = _facts(documents)
    left, right = window[0], min(window[1], max_q - 1)
    told = Packed(
        _of_every_entry(starts_q, batch, seqlen_q, device),
        _of_every_entry(starts_kv, batch, seqlen_kv, device),
        max_q,
        max(max_kv, max_q) if is_a_window((left, right)) else max_kv,
        (left, right),
    )
    if not has_gaps:
        return told
    return replace(told, used_kv=torch.tensor(seqlens_kv, dtype=torch.int32, device=device).repeat(batch))


@functools.lru_cache(maxsize=8)
def _kept(
    documents: bytes,
    has_gaps: bool,
    window: tuple[int, int],
    batch: int,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
) -> Packed:
    """The same, kept: what is made on the host is waited for when it goes to a device."""
    with torch.inference_mode(False):
        return _made(documents, has_gaps, window, batch, seqlen_q, seqlen_kv, device)


@constant
def _facts(packed: bytes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]:
    """(first query of each document, first key, keys, most queries, most keys)."""
    documents = unpack(packed)
    queries, keys = zip(*documents.sizes()) if documents.k0 else ((), ())
    most = max(queries, default=0)
    if most == 1 and min(queries) == 0:
        most = 2
    return tuple(documents.q[:-1]), tuple(documents.k0), tuple(keys), most, max(keys, default=0)


def _of_every_entry(starts: tuple[int, ...], batch: int, seqlen: int, device: torch.device) -> Tensor:
    """Starts in one batch entry, in all of them behind each other, and the end of the last."""
    entries = torch.arange(batch, device=device, dtype=torch.int32) * seqlen
    every = (torch.tensor(starts, dtype=torch.int32, device=device) + entries[:, None]).flatten()
    return torch.cat([every, every.new_full((1,), batch * seqlen)])
