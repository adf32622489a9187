"""What each bias of attn is in xFormers' terms: the bias objects that mean the same, those that cost least first.

An operator takes some of its classes and not others, so that a bias has several forms. Documents, and lengths of keys,
are for xFormers those of one batch entry: batch entries are laid behind each other there (`packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from attn_core import AttnBias, Cached, Causal, KeyPadding, Segments, TensorBias, Window
from attn_core.bias import Sum
from attn_core.bias.segments import band_of
from attn_core.bias.zero_padded import ZeroPadded
from torch import Tensor

from .. import library
from .bands import Sides, from_both_corners, leaves_a_row_empty
from .lengths import LengthsOnDevice

#: Of a tensor: the name by which operators list that they take one.
TENSOR = "Tensor"
NO_BIAS = "NoneType"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to say a bias to xFormers.

    `made` gives the bias object, its tensors on that device; of a tensor (`kind` is TENSOR) and of one beside a causal
    mask, it is called with the tensor as the operator takes it. It raises ValueError or RuntimeError where the class
    does not take these lengths. `instead_of_tensor`: of use to an operator that takes no tensor.
    """

    kind: str  #: the name of xFormers' class
    packed: bool = False  #: batch entries lie behind each other, in one
    made: Callable[[torch.device], Any] = lambda device: None
    tensor: TensorBias | None = None
    instead_of_tensor: bool = False


def forms(bias: AttnBias | None, batch: int, seqlen_q: int, seqlen_kv: int) -> Iterator[Form]:
    """Every form of a bound bias; none where xFormers cannot say it."""
    if isinstance(bias, ZeroPadded):
        bias = bias.padded
    if bias is None:
        yield Form(kind=NO_BIAS)
        yield _padded("BlockDiagonalPaddedKeysMask", batch, seqlen_q, seqlen_kv)
    elif isinstance(bias, TensorBias):
        yield Form(kind=TENSOR, tensor=bias)
    elif isinstance(bias, (Causal, Window)):
        yield from _of_band(bias, batch, seqlen_q, seqlen_kv)
    elif isinstance(bias, Segments):
        yield from _of_documents(bias, batch, seqlen_kv)
    elif isinstance(bias, KeyPadding):
        yield _padded("BlockDiagonalPaddedKeysMask", batch, seqlen_q, seqlen_kv, bias.seqlens)
    elif isinstance(bias, Cached):
        yield from _of_cache(bias, batch, seqlen_q, seqlen_kv)
    elif isinstance(bias, Sum):
        yield from _of_sum(bias, seqlen_q, seqlen_kv)


def _of_band(bias: Causal | Window, batch: int, seqlen_q: int, seqlen_kv: int) -> Iterator[Form]:
    of_top, of_bottom = from_both_corners(bias, seqlen_q, seqlen_kv)
    left, right = of_bottom
    far = seqlen_q + seqlen_kv  # as good as no limit
    if of_top == (None, 0):
        yield _plain("LowerTriangularMask")
    if of_bottom == (None, 0):
        yield _plain("LowerTriangularFromBottomRightMask")
    if right == 0 and left is not None and left >= 0:
        yield _plain("LowerTriangularFromBottomRightLocalAttentionMask", left + 1)
    if (left is None or left >= 0) and (right is None or right >= 0):
        yield _plain(
            "LocalAttentionFromBottomRightMask", far if left is None else left, far if right is None else right
        )
    lengths = (seqlen_q,) * batch, (seqlen_kv,) * batch
    yield from _of_bands_of_documents(of_top, of_bottom, *lengths)
    for form in _of_padded_bands(of_bottom, batch, seqlen_q, seqlen_kv, None):
        yield replace(form, instead_of_tensor=True)


def _of_documents(bias: Segments, batch: int, seqlen_kv: int) -> Iterator[Form]:
    queries, keys = bias.seqlens_q * batch, bias.seqlens_kv * batch
    left, right, corner = band_of(bias.within)
    alike = bias.seqlens_q == bias.seqlens_kv
    of_top: Sides | None = (left, right) if corner != "bottom-right" or alike else None
    of_bottom: Sides | None = (left, right) if corner == "bottom-right" or alike else None
    whole = left is None and right is None
    if not bias.has_gaps:
        if whole:
            yield _packed("BlockDiagonalMask", queries, keys)
        else:
            yield from _of_bands_of_documents(of_top, of_bottom, queries, keys)
    starts = tuple(k0 + entry * seqlen_kv for entry in range(batch) for _, _, k0, _ in bias.documents())
    ends = (*starts, batch * seqlen_kv)
    if whole:
        yield _gappy("BlockDiagonalGappyKeysMask", queries, keys, ends)
    elif of_bottom == (None, 0):
        yield _gappy("BlockDiagonalCausalWithOffsetGappyKeysMask", queries, keys, ends)


def _of_bands_of_documents(
    of_top: Sides | None, of_bottom: Sides | None, queries: tuple[int, ...], keys: tuple[int, ...]
) -> Iterator[Form]:
    """Of documents behind each other, in each of which the band is the same."""
    if of_top == (None, 0):
        yield _packed("BlockDiagonalCausalMask", queries, keys)
    if of_bottom == (None, 0):
        yield _packed("BlockDiagonalCausalFromBottomRightMask", queries, keys)
    if of_top is not None and of_top[1] == 0 and of_top[0] is not None and of_top[0] >= 0:
        yield _packed("BlockDiagonalCausalLocalAttentionMask", queries, keys, of_top[0] + 1)
    if of_bottom is not None and of_bottom[1] == 0 and of_bottom[0] is not None and of_bottom[0] >= 0:
        yield _packed("BlockDiagonalCausalLocalAttentionFromBottomRightMask", queries, keys, of_bottom[0] + 1)


def _of_cache(bias: Cached, batch: int, seqlen_q: int, seqlen_kv: int) -> Iterator[Form]:
    left, right, corner = band_of(bias.within)
    if corner == "bottom-right":
        yield from _of_padded_bands((left, right), batch, seqlen_q, seqlen_kv, bias.seqlens_kv)


def _of_padded_bands(
    of_bottom: Sides, batch: int, seqlen_q: int, seqlen_kv: int, seqlens: Tensor | None
) -> Iterator[Form]:
    left, right = of_bottom
    far = seqlen_q + seqlen_kv
    if of_bottom == (None, 0):
        yield _padded("BlockDiagonalCausalWithOffsetPaddedKeysMask", batch, seqlen_q, seqlen_kv, seqlens)
    if right == 0 and left is not None and left >= 0:
        name = "BlockDiagonalCausalLocalAttentionPaddedKeysMask"
        yield _padded(name, batch, seqlen_q, seqlen_kv, seqlens, _window_size=left + 1)
    if (left is None or left >= 0) and (right is None or right >= 0):
        sides = {"window_left": far if left is None else left, "window_right": far if right is None else right}
        yield _padded("BlockDiagonalLocalAttentionPaddedKeysMask", batch, seqlen_q, seqlen_kv, seqlens, **sides)


def _of_sum(bias: Sum, seqlen_q: int, seqlen_kv: int) -> Iterator[Form]:
    """A causal mask from the top left and a tensor."""
    tensor, *masks = bias.parts
    if not (isinstance(tensor, TensorBias) and len(masks) == 1 and isinstance(masks[0], (Causal, Window))):
        return
    if from_both_corners(masks[0], seqlen_q, seqlen_kv)[0] == (None, 0):
        yield Form(kind="LowerTriangularMaskWithTensorBias", tensor=tensor)


# The objects


def _plain(name: str, *sides: int) -> Form:
    return Form(kind=name, made=lambda device: getattr(library.attn_bias(), name)(*sides))


def _packed(name: str, queries: tuple[int, ...], keys: tuple[int, ...], window_size: int | None = None) -> Form:
    def made(device: torch.device) -> Any:
        return _documents(library.attn_bias(), name, queries, keys, window_size, device)

    return Form(kind=name, packed=True, made=made)


def _gappy(name: str, queries: tuple[int, ...], keys: tuple[int, ...], starts: tuple[int, ...]) -> Form:
    def made(device: torch.device) -> Any:
        return _documents_with_gaps(library.attn_bias(), name, queries, keys, starts, device)

    return Form(kind=name, packed=True, made=made)


def _padded(name: str, batch: int, seqlen_q: int, seqlen_kv: int, seqlens: Tensor | None = None, **sides: int) -> Form:
    def made(device: torch.device) -> Any:
        classes = library.attn_bias()
        whole = _room(classes, batch, seqlen_q, seqlen_kv, device)
        keys = whole.k_seqinfo
        if seqlens is not None and not seqlens.is_meta:
            # max_seqlen stays the room that there is, so that nothing waits for a device.
            on_device = seqlens.to(device, torch.int32)
            keys = replace(keys, seqlen=on_device, seqlen_py=LengthsOnDevice(seqlens))
        return getattr(classes, name)(q_seqinfo=whole.q_seqinfo, k_seqinfo=keys, **sides)

    return Form(kind=name, packed=True, made=made)


# `classes` is xFormers' module of them. It makes tensors from pinned memory where it is given a device; made on the CPU
# and moved, they do without.


@lru_cache(maxsize=32)
def _documents(
    classes: Any,
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    window_size: int | None,
    device: torch.device,
) -> Any:
    with torch.inference_mode(False):
        whole = classes.BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=torch.device("cpu")).to(device)
        sides = {} if window_size is None else {"_window_size": window_size}
        return getattr(classes, name)(q_seqinfo=whole.q_seqinfo, k_seqinfo=whole.k_seqinfo, **sides)


@lru_cache(maxsize=32)
def _documents_with_gaps(
    classes: Any,
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
) -> Any:
    with torch.inference_mode(False):
        made = getattr(classes, name).from_seqlens(list(queries), list(starts), list(keys), device=torch.device("cpu"))
        return made.to(device)


@lru_cache(maxsize=32)
def _room(classes: Any, batch: int, seqlen_q: int, seqlen_kv: int, device: torch.device) -> Any:
    """Sequences that fill their room."""
    with torch.inference_mode(False):
        lengths = [seqlen_q] * batch, seqlen_kv, [seqlen_kv] * batch
        return classes.BlockDiagonalPaddedKeysMask.from_seqlens(*lengths, device=torch.device("cpu")).to(device)


def may_leave_a_row_empty(bias: AttnBias | None, seqlen_q: int, seqlen_kv: int) -> bool:
    """Whether it is known beforehand that some query sees no key; lengths that a tensor holds are not."""
    if isinstance(bias, ZeroPadded):
        bias = bias.padded
    if isinstance(bias, Sum):
        return any(may_leave_a_row_empty(part, seqlen_q, seqlen_kv) for part in bias.parts)
    if isinstance(bias, (Causal, Window)):
        return leaves_a_row_empty(from_both_corners(bias, seqlen_q, seqlen_kv)[1], seqlen_q, seqlen_kv)
    if isinstance(bias, Segments):
        for queries, keys in zip(bias.seqlens_q, bias.seqlens_kv):
            within = bias.within
            sides = (None, None) if within is None else from_both_corners(within, queries, keys)[1]
            if leaves_a_row_empty(sides, queries, keys):
                return True
    return False
