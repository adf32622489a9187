"""Packed documents as NATTEN takes them: one batch entry, and where each document begins, as int32 on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from attn_core import Causal, Problem, Refusal, Segments
from torch import Tensor


def refusals(problem: Problem) -> Iterator[Refusal]:
    """Why these documents are not for NATTEN."""
    bias = problem.bias
    if not isinstance(bias, Segments):
        return
    if problem.compiling:
        yield Refusal("compiling", "takes Segments outside of graphs only")
    if bias.has_gaps:
        yield Refusal("bias", "takes documents whose keys follow each other, got Segments with starts_kv")
    sizes = list(zip(bias.seqlens_q, bias.seqlens_kv))
    if not all(queries and keys for queries, keys in sizes):
        queries, keys = next(size for size in sizes if not all(size))
        yield Refusal("bias", f"takes documents of at least one query and one key, got one of {queries} and {keys}")
    if bias.within is not None and not is_causal(bias):
        text = "takes whole documents, or Causal from each one's top left"
        yield Refusal("bias", f"{text}, got within={bias.within!r}")


def is_causal(bias: Segments) -> bool:
    """Whether each document is causal as NATTEN means it: query i sees the keys up to i."""
    if not isinstance(bias.within, Causal):
        return False
    return bias.within.corner == "top-left" or bias.seqlens_q == bias.seqlens_kv


def offsets(bias: Segments, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """(offsets of the queries, of the keys, longest queries, longest keys); batch entries are behind each other."""
    if torch._C._len_torch_dispatch_stack():  # what is made under fake tensors is of no use later
        return _offsets(bias.seqlens_q, bias.seqlens_kv, batch, device)
    return _kept_offsets(bias.seqlens_q, bias.seqlens_kv, batch, device)


def _offsets(
    seqlens_q: tuple[int, ...], seqlens_kv: tuple[int, ...], batch: int, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    with torch.inference_mode(False):
        made = [
            torch.tensor((0, *seqlens * batch), dtype=torch.int64).cumsum(0).to(device, torch.int32)
            for seqlens in (seqlens_q, seqlens_kv)
        ]
    return made[0], made[1], max(seqlens_q), max(seqlens_kv)


_kept_offsets = lru_cache(maxsize=8)(_offsets)
