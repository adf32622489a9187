"""A plain tensor as `attn_mask` of scaled_dot_product_attention: said to be deprecated, once per place that passes one.

`TensorBias` says what the tensor is, and computes the same. ATTN_TENSOR_MASK has the last word: "warn" (the default),
"silent" or "error". `attention` takes tensors without a word.
"""

from __future__ import annotations

import warnings
from types import CodeType, FrameType

from .environment import read_environment
from .errors import InputTypeError
from .tracing import constant

TEXT = (
    "attn_mask: a plain tensor is deprecated; pass attn_core.TensorBias(tensor), which computes the same"
    ' (ATTN_TENSOR_MASK="silent" keeps this quiet)'
)

#: Places kept; where there are more, all may be warned of anew.
PLACES = 4096

#: Places that need no look: the address of the code object plus the offset in it, one number, which is cheaper to make
#: and to find than a pair. Since Python 3.11 it lies within the object itself, so that no two places have the same.
seen: set[int] = set()
#: What keeps those addresses from being given to other code.
_kept: dict[int, CodeType] = {}


def notice(frame: FrameType) -> None:
    """Warns of the call in `frame`, that of the caller of whoever calls this. Raises InputTypeError under "error"."""
    mode = read_environment().tensor_mask
    if mode == "error":
        raise InputTypeError(TEXT)
    if mode == "warn":
        warnings.warn(TEXT, DeprecationWarning, stacklevel=3)  # raises where filters make it an error
    if len(seen) >= PLACES:
        forget()
    _kept[id(frame.f_code)] = frame.f_code
    seen.add(id(frame.f_code) + frame.f_lasti)


@constant
def notice_traced() -> None:
    """The same where a graph is traced: no place is known, so it only minds "error"."""
    if read_environment().tensor_mask == "error":
        raise InputTypeError(TEXT)


def forget() -> None:
    """Has every place looked at anew."""
    seen.clear()
    _kept.clear()
