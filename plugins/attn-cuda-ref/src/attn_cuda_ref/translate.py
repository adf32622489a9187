"""A bias of the core, as the text of a kernel has it: a type of masks.cuh or scores.cuh, and what it is made of.

What code depends on (which masks there are, the extents of a neighborhood, a dtype) is in the type, so it is a constant
of the compilation; lengths, limits and tensors are arguments. An op of torch takes both: strings, numbers, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from attn_core import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    Intersection,
    KeyPadding,
    Mask,
    Neighborhood,
    PrefixLM,
    RelPosTable,
    Segments,
    TensorBias,
    Window,
)
from attn_core.bias.alibi import paper_slopes
from attn_core.bias.diagonal import offset
from attn_core.bias.documents import key_ranges, numbers
from attn_core.bias.segments import band_of
from attn_core.tracing import is_traced
from torch import Tensor

#: A limit that is none: more keys than any length.
UNLIMITED = 1 << 40

#: The name in a text of what a tensor holds.
NUMBERS = {
    torch.float32: "float",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "double",
    torch.bool: "unsigned char",
    torch.int32: "int",
    torch.int64: "long long",
}


class Term(NamedTuple):
    """One mask or score.

    `fields` says what the type is made of, in order: `t` the address of the next tensor; `s` that, and its strides, 0
    where the size is 1; `n` the next number; braces where a part is made of several.
    """

    type: str
    fields: str = ""
    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[Any, ...] = ()  #: ints; symbolic ones where a graph is traced


class Bias(NamedTuple):
    """A whole bias, as an op takes it: tensors and numbers are those of the mask, then those of each score."""

    mask: str
    mask_fields: str
    scores: list[str]
    score_fields: list[str]
    tensors: list[Tensor]
    numbers: list[Any]


def translated(bias: AttnBias | None, device: torch.device) -> Bias:
    """Raises KeyError for a kind that `can_be_translated` denies."""
    mask, scores = Term("Everything"), []
    if bias is not None:
        if bias.mask is not None:
            mask = _MASKS[type(bias.mask)](bias.mask, device)
        for part in bias.scores:
            if isinstance(part, TensorBias) and part.tensor.dtype is torch.bool:
                dense = _dense(part, device)
                mask = dense if mask.type == "Everything" else _both(mask, dense)
            else:
                scores.append(_SCORES[type(part)](part, device))
    terms = [mask, *scores]
    return Bias(
        mask.type,
        mask.fields,
        [score.type for score in scores],
        [score.fields for score in scores],
        [tensor for term in terms for tensor in term.tensors],
        [number for term in terms for number in term.numbers],
    )


def strangers(bias: AttnBias | None) -> Iterator[AttnBias]:
    """The parts of a bias that have no type here."""
    if bias is None:
        return
    yield from () if bias.mask is None else _strange_masks(bias.mask)
    yield from (part for part in bias.scores if type(part) not in _SCORES)


def _strange_masks(mask: Mask) -> Iterator[Mask]:
    if isinstance(mask, Intersection):
        for part in mask.parts:
            yield from _strange_masks(part)
    elif isinstance(mask, BlockMask):
        if mask.full is not None and mask.has_padding:  # of which there is none in a block that is seen whole
            yield mask
        yield from () if mask.within is None else _strange_masks(mask.within)
    elif type(mask) not in _MASKS:
        yield mask


# Masks. What is kept for later calls is made on the CPU, and is there when the copy returns. Made on a device, it would
# be there for the stream of that call alone.


def _band(mask: Any, device: torch.device) -> Term:
    left, right = (None, 0) if isinstance(mask, Causal) else (mask.left, mask.right)
    return Term("Band", "nnn", (), (mask.offset, *_limits(left, right)))


def _limits(left: int | None, right: int | None) -> tuple[int, int]:
    return UNLIMITED if left is None else left, UNLIMITED if right is None else right


def _prefix(mask: Any, device: torch.device) -> Term:
    if isinstance(mask.prefix, Tensor):
        return Term("Prefix", "nn{s}", (mask.prefix.to(device, torch.int64),), (mask.offset, 0))
    return Term("Prefix", "nn{}", (), (mask.offset, mask.prefix))


def _key_padding(mask: Any, device: torch.device) -> Term:
    limits = UNLIMITED, UNLIMITED, 0, 0
    return Term("Cached", "{s}nnnn", (mask.seqlens.to(device, torch.int64),), limits)


def _cached(mask: Any, device: torch.device) -> Term:
    left, right, corner = band_of(mask.within)
    of_band = *_limits(left, right), int(corner == "bottom-right"), mask.bound_lengths()[0]
    return Term("Cached", "{s}nnnn", (mask.seqlens_kv.to(device, torch.int64),), of_band)


def _segments(mask: Any, device: torch.device) -> Term:
    ranges, exist = (_tables if is_traced() else _kept_tables)(mask, device)
    tables = (ranges[0], ranges[1]) if exist is None else (ranges[0], ranges[1], exist)
    return Term("Ranges", "t" * len(tables), tables)


def _tables(mask: Segments, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The keys of each query, int32 `[2, seqlen_q]`, and which keys exist, `[seqlen_kv]`; None where all do."""
    valid = mask.valid_keys("cpu")
    ranges = key_ranges(numbers(mask.packed), band_of(mask.within)).to(device)
    return ranges, None if valid is None else valid[0].to(device)


@lru_cache(maxsize=8)
def _kept_tables(mask: Segments, device: torch.device) -> tuple[Tensor, Tensor | None]:
    with torch.inference_mode(False):  # what is made within it could not be saved for a backward later
        return _tables(mask, device)


def _neighborhood(mask: Any, device: torch.device) -> Term:
    axes = [(1, 1, 1, 1, False)] * (3 - len(mask.axes)) + list(mask.axes)
    texts = [f"Axis<{', '.join(str(int(number)) for number in axis)}>" for axis in axes]
    return Term(f"Neighborhood<{', '.join(texts)}>")


def _blocks(mask: Any, device: torch.device) -> Term:
    within = Term("Everything") if mask.within is None else _MASKS[type(mask.within)](mask.within, device)
    tensors: tuple[Tensor, ...] = (_of_rank_four(mask.blocks.to(device)),)
    fields = "{s}{}"
    if mask.full is not None:
        tensors, fields = (*tensors, _of_rank_four(mask.full.to(device))), "{s}{s}"
    kind = f"Blocks<{mask.block_size[0]}, {mask.block_size[1]}, {within.type}>"
    term = Term(kind, f"{fields}{{{within.fields}}}", (*tensors, *within.tensors), within.numbers)
    return _both(term, within) if mask.has_padding else term  # blocks say of no key that it does not exist


def _intersection(mask: Any, device: torch.device) -> Term:
    first, *others = [_MASKS[type(part)](part, device) for part in mask.parts]
    for other in others:
        first = _both(first, other)
    return first


def _both(a: Term, b: Term) -> Term:
    fields = f"{{{a.fields}}}{{{b.fields}}}"
    return Term(f"And<{a.type}, {b.type}>", fields, a.tensors + b.tensors, a.numbers + b.numbers)


def _dense(bias: TensorBias, device: torch.device) -> Term:
    return Term("Dense", "{s}", (_of_rank_four(bias.tensor),))


def _of_rank_four(tensor: Tensor) -> Tensor:
    """The same with the dimensions [batch, num_heads, rows, columns]."""
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


_MASKS: dict[type, Callable[[Any, torch.device], Term]] = {
    Causal: _band,
    Window: _band,
    PrefixLM: _prefix,
    KeyPadding: _key_padding,
    Cached: _cached,
    Segments: _segments,
    Neighborhood: _neighborhood,
    BlockMask: _blocks,
    Intersection: _intersection,
}


# Scores


def _added(bias: Any, device: torch.device) -> Term:
    return Term(f"Added<{NUMBERS[bias.tensor.dtype]}>", "s", (_of_rank_four(bias.tensor),))


def _slopes(bias: Any, device: torch.device) -> Term:
    if bias.slopes is None:
        slopes = (_paper_slopes if is_traced() else _kept_paper_slopes)(bias.num_heads, device)
    else:
        slopes = bias.slopes if bias.slopes.ndim == 2 else bias.slopes[None]
    start = offset(bias.corner, *bias.bound_lengths())
    return Term(f"Slopes<{NUMBERS[slopes.dtype]}>", "sn", (slopes,), (start,))


def _paper_slopes(num_heads: int, device: torch.device) -> Tensor:
    return paper_slopes(torch.arange(num_heads, device="cpu"), num_heads, torch.float32)[None].to(device)


@lru_cache(maxsize=64)
def _kept_paper_slopes(num_heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _paper_slopes(num_heads, device)


def _table(bias: Any, device: torch.device) -> Term:
    missing = (1,) * (3 - len(bias.extents))
    sizes = missing + tuple(bias.table.shape[1:])
    axes = zip(missing + bias.extents, sizes, missing + bias.dilation)
    offsets = ", ".join(f"Offsets<{extent}, {size}, {dilation}>" for extent, size, dilation in axes)
    table = bias.table.reshape(bias.table.shape[0], *sizes)
    return Term(f"Table<{NUMBERS[table.dtype]}, {offsets}>", "s", (table,))


_SCORES: dict[type, Callable[[Any, torch.device], Term]] = {
    TensorBias: _added,
    ALiBi: _slopes,
    RelPosTable: _table,
}
