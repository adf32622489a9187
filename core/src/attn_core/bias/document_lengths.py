"""What Segments is made of, checked: lengths, offsets, and where keys start. Errors name the document."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..tracing import constant
from .base import _is_tracing
from .diagonal import check_corner_is_decided
from .documents import WHOLE, Band, pack
from .whole_numbers import as_int, is_int


def plain_ints(name: str, values: Any) -> tuple[int, ...]:
    """The ints that a caller gave; numbers that are symbolic become constants of the graph."""
    if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
        hint = "; Segments.from_offsets takes tensors of offsets" if isinstance(values, Tensor) else ""
        raise InputTypeError(f"Segments: {name} must be a sequence of ints, got {type(values).__name__}{hint}")
    made: list[int] = []
    for n, value in enumerate(values):
        number = value if type(value) is int else as_int(value)
        if not is_int(number):
            raise InputTypeError(f"Segments: {name} must be ints, got {value!r} for document {n}")
        made.append(operator.index(number))
    return tuple(made)


def lengths_between(name: str, offsets: Any) -> list[int]:
    if isinstance(offsets, Tensor):
        if _is_tracing():
            raise InputTypeError(
                f"Segments: {name} is a tensor, whose values cannot be read while a graph is traced; give ints, or make"
                " the Segments before and pass it in"
            )
        if offsets.ndim != 1 or offsets.is_floating_point() or offsets.is_complex() or offsets.dtype is torch.bool:
            raise InputTypeError(
                f"Segments: {name} must be integers, [documents + 1], got {offsets.dtype} of shape"
                f" {list(offsets.shape)}"
            )
        if offsets.is_meta:
            raise InputTypeError(f"Segments: {name} must be a tensor that holds values, got one on the meta device")
        offsets = offsets.tolist()
    values = plain_ints(name, offsets)
    if not values or values[0] != 0:
        raise InputError(f"Segments: {name}[0] must be 0, where the first document begins, got {list(values[:1])}")
    for n, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise InputError(f"Segments: {name} must not decrease, got {name}[{n}]={start}, {name}[{n + 1}]={end}")
    return [end - start for start, end in itertools.pairwise(values)]


@constant
def packed_documents(
    queries: tuple[int, ...], keys: tuple[int, ...], starts: tuple[int, ...] | None, kind: str, band: Band
) -> bytes:
    """The documents, checked."""
    for name, values in (("seqlens_kv", keys), ("starts_kv", starts)):
        if values is not None and len(values) != len(queries):
            raise InputError(f"Segments: seqlens_q has {len(queries)} documents, {name} has {len(values)}")
    for name, values in (("seqlens_q", queries), ("seqlens_kv", keys), ("starts_kv", starts)):
        for n, value in enumerate(values or ()):
            if value < 0:
                raise InputError(f"Segments: {name} must be >= 0, got {value} for document {n}")
    if starts is not None:
        for n, (start, size, following) in enumerate(zip(starts, keys, starts[1:])):
            if following < start + size:
                raise InputError(
                    f"Segments: keys must not overlap or go back, got keys {start} to {start + size} for document {n}"
                    f" and starts_kv={following} for document {n + 1}"
                )
    if band != WHOLE:
        for n, (seqlen_q, seqlen_kv) in enumerate(zip(queries, keys)):
            try:
                check_corner_is_decided(kind, band[2], seqlen_q, seqlen_kv)
            except InputError as error:
                raise InputError(f"Segments: in document {n}, {error}") from None
    return pack(queries, keys, starts)
