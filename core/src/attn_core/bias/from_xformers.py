"""From the bias objects of xFormers, without importing it.

Only exact classes are known: what a subclass changes cannot be seen. Their lengths are read where Python has them, so
that no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..errors import InputTypeError
from .base import AttnBias
from .causal import Causal
from .diagonal import Corner
from .segments import Segments
from .tensor import TensorBias
from .window import Window

#: Where the base class of all lies: in xFormers, and in the library that its later versions take it from.
BASES = ("xformers.ops.fmha.attn_bias.AttentionBias", "mslk.attention.fmha.attn_bias.AttentionBias")

Within = Callable[[Any], "Causal | Window | None"]


def from_xformers(bias: Any) -> AttnBias:
    """The same bias. Documents know their lengths, so that it is bound; the others fit any.

    Raises InputTypeError for a class without a counterpart, InputError for keys of documents that overlap.
    """
    cls = type(bias)
    convert = _converters.get(cls.__qualname__)
    if convert is not None and cls.__module__ in _MODULES:
        return convert(bias)
    if cls.__qualname__.startswith("Paged"):
        raise InputTypeError(
            f"bias: {cls.__name__} of xFormers packs queries of all sequences in one and reads their keys from pages,"
            " which no bias here says; Paged(page_table, seqlens_kv, page_size) takes queries by batch entry"
        )
    raise InputTypeError(
        f"bias: {cls.__module__}.{cls.__qualname__} is not one of xFormers' bias classes that are known here"
        f" ({', '.join(sorted(_converters))}); a subclass may mean something else. as_bias.register(...) adds a class"
    )


def _whole(bias: Any) -> None:
    return None


def _causal(corner: Corner) -> Within:
    return lambda bias: Causal(corner)


def _last_keys(corner: Corner) -> Within:
    """Its window_size counts the key on the diagonal, too."""
    return lambda bias: Window(bias._window_size - 1, 0, corner)


def _around(bias: Any) -> Window:
    return Window(bias.window_left, bias.window_right, "bottom-right")


def _segments(within: Within) -> Callable[[Any], Segments]:
    """Of documents behind each other, queries and keys."""

    def convert(bias: Any) -> Segments:
        queries, keys = bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py
        return Segments.from_offsets(queries, keys, within=within(bias)).bind(queries[-1], keys[-1])

    return convert


def _segments_with_gaps(within: Within) -> Callable[[Any], Segments]:
    """Of documents whose keys have room for more, or lie anywhere: where they start, how many, and all room at last."""

    def convert(bias: Any) -> Segments:
        offsets, info = bias.q_seqinfo.seqstart_py, bias.k_seqinfo
        queries = [end - start for start, end in pairwise(offsets)]
        *starts, seqlen_kv = info.seqstart_py
        segments = Segments(queries, info.seqlen_py, within=within(bias), starts_kv=starts)
        return segments.bind(offsets[-1], seqlen_kv)

    return convert


def _causal_and_tensor(bias: Any) -> AttnBias:
    return Causal("top-left") + TensorBias(bias._bias)


_MODULES = tuple(base.rpartition(".")[0] for base in BASES)

_converters: dict[str, Callable[[Any], AttnBias]] = {
    "LowerTriangularMask": lambda bias: Causal("top-left"),
    "LowerTriangularMaskWithTensorBias": _causal_and_tensor,
    "LowerTriangularFromBottomRightMask": lambda bias: Causal("bottom-right"),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda bias: Window(bias._window_size - 1, 0, "bottom-right"),
    "LocalAttentionFromBottomRightMask": _around,
    "BlockDiagonalMask": _segments(_whole),
    "BlockDiagonalCausalMask": _segments(_causal("top-left")),
    "BlockDiagonalCausalFromBottomRightMask": _segments(_causal("bottom-right")),
    "BlockDiagonalCausalLocalAttentionMask": _segments(_last_keys("top-left")),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _segments(_last_keys("bottom-right")),
    "BlockDiagonalPaddedKeysMask": _segments_with_gaps(_whole),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _segments_with_gaps(_causal("bottom-right")),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _segments_with_gaps(_around),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _segments_with_gaps(_last_keys("bottom-right")),
    "BlockDiagonalGappyKeysMask": _segments_with_gaps(_whole),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _segments_with_gaps(_causal("bottom-right")),
}
