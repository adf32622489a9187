"""The mask function: where transformers' own words say what a mask means, attn is told that, not a dense tensor.

transformers describes a mask as functions put together (causal, a window, packed sequences, padding) and asks a mask
function to write it out. `structured_mask` answers with a `LazyMask`: to everybody but attn a boolean tensor like the
host's own, which is written out when somebody first looks at it; to attn a bias, by which kernels skip what is masked.

Models slice, cast, concatenate and write into their masks. Each such operation is done on the dense tensor and gives a
plain tensor, and the mask that it was done on is from then on that dense tensor to attn, too: what it means is said
only as long as nobody but attn has touched it. So what a model does to its mask cannot get lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...bias import AttnBias, Causal, Mask, MaskMod, Segments, TensorBias, Window
from ...bias.diagonal import Corner

#: The least number of keys from which on structure is worth having: below it, writing out the mask once costs less
#: than a kernel that skips can save in all layers.
LEAST_KEYS = 512

_HOST = "transformers.masking_utils"

#: Parts of a mask function, by the name of the function of the host that made it.
Parts = dict[str, dict[str, Any]]


class LazyMask(Tensor):
    """A mask `[batch, 1, seqlen_q, seqlen_kv]` that knows what it means, until somebody looks inside.

    Boolean, or floating where the model is to have the masks of "eager".
    """

    _meaning: AttnBias | None
    _write: Callable[[], Tensor]
    _dense: Tensor | None
    _touched: bool

    @staticmethod
    def __new__(
        cls,
        meaning: AttnBias | None,
        write: Callable[[], Tensor],
        size: Any,
        device: Any,
        dtype: torch.dtype = torch.bool,
    ) -> LazyMask:
        """`meaning` None: nothing is masked. `write` gives the dense tensor, of that size and dtype, on that device."""
        mask: LazyMask = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        mask._meaning, mask._write, mask._dense, mask._touched = meaning, write, None, False
        return mask

    def __init__(
        self,
        meaning: AttnBias | None,
        write: Callable[[], Tensor],
        size: Any,
        device: Any,
        dtype: torch.dtype = torch.bool,
    ) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_looked_at, args), **tree_map(_looked_at, kwargs or {}))

    def dense(self) -> Tensor:
        """The mask written out; the same tensor each time."""
        if self._dense is None:
            self._dense = self._write().contiguous()  # as its strides say, whatever the host's are
        return self._dense

    def bias(self) -> AttnBias | Tensor | None:
        """What it means; the dense tensor where somebody has looked at it, and may have changed it."""
        return self.dense() if self._touched else self._meaning

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask({'a tensor' if self._touched else self._meaning!r}, size={tuple(self.shape)})"

    # What torch does without asking the dispatcher

    def tolist(self) -> Any:
        return _looked_at(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return _looked_at(self).numpy(force=force)

    def data_ptr(self) -> int:
        return int(_looked_at(self).data_ptr())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _looked_at(x: Any) -> Any:
    """The dense tensor of a LazyMask, whose meaning counts no more; anything else as it is."""
    if not isinstance(x, LazyMask):
        return x
    x._touched = True
    return x.dense()


def structured_mask(
    stock: Callable[..., Tensor | None],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    floating: torch.dtype | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask that transformers asks for: a LazyMask, None where none is needed, or what `stock` gives.

    Args:
        stock: the host's mask function for its "sdpa", or for "eager"; asked where the mask is small, traced, or says
            something that is not known here.
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: the rule, made of transformers' own functions.
        attention_mask: `[batch, seqlen]`, True where a token is.
        allow_is_causal_skip, allow_is_bidirectional_skip: None may say "causal", "nothing is masked".
        device: of the mask.
        floating: the dtype of what `stock` gives; None: it is boolean.
        others: for `stock`.
    """
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
    }
    sizes |= {"kv_offset": kv_offset, "device": device}
    if mask_function is not None:
        sizes["mask_function"] = mask_function

    def write(**skips: bool) -> Tensor | None:
        return stock(**sizes, attention_mask=attention_mask, **skips, **others)

    skips = {
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    unusual = attention_mask is not None and (
        attention_mask.dtype is not torch.bool or attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size
    )
    if q_length < 2 or kv_length < LEAST_KEYS or unusual or is_watched(q_offset, attention_mask):
        return write(**skips)
    parts = parts_of(mask_function)
    if parts is None:
        return write(**skips)
    # The host reads an offset that is a tensor here, too.
    diagonal = int(q_offset) - kv_offset
    understood = rule_of(parts, q_length, kv_length, diagonal)
    if understood is None:
        return write(**skips)
    (rule,) = understood
    # Keys that lie behind the diagonal of the last query are masked anyhow: those of a cache that is not yet full.
    seen = kv_length if rule is None or isinstance(rule, Segments) else min(kv_length, q_length + diagonal)
    if isinstance(rule, Window) and rule.right:
        seen = kv_length
    there = None if attention_mask is None else _padded_to(attention_mask, kv_offset, kv_length)
    if there is not None and bool(there[:, :seen].all()):
        there = None
    if there is None:
        if rule is None and allow_is_bidirectional_skip:
            return None
        if isinstance(rule, Causal) and diagonal == 0 and allow_is_causal_skip:
            return None
    meaning: AttnBias | None = rule
    if there is not None:
        meaning = TensorBias(there[:, None, None, :]) if rule is None else present(there) & rule
    dense_skips = dict.fromkeys(skips, False)
    size, dtype = (batch_size, 1, q_length, kv_length), floating or torch.bool
    return LazyMask(meaning, lambda: write(**dense_skips), size, device, dtype)  # type: ignore[arg-type,return-value]


def _is_present(b: Tensor, h: Tensor, q: Tensor, k: Tensor, there: Tensor) -> Tensor:
    return there[b, k]


def present(there: Tensor) -> Mask:
    """Keys that are there, `[batch, seqlen_kv]`; what is not is finite, so nobody has to step around it."""
    return MaskMod(_is_present, (there,), batch=there.shape[0])


def _padded_to(attention_mask: Tensor, start: int, length: int) -> Tensor:
    """The entries of `length` keys from `start` on; False behind its end."""
    there = attention_mask[:, start : start + length]
    lacking = length - there.shape[1]
    return torch.nn.functional.pad(there, (0, lacking)) if lacking else there


def is_watched(*values: Any) -> bool:
    """Whether somebody traces, transforms or fakes what is computed, so that tensors have no values to look at."""
    if torch.compiler.is_compiling() or torch.jit._trace.is_tracing() or torch._C._len_torch_dispatch_stack():  # type: ignore[no-untyped-call]
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(value, Tensor) and (type(value) is not Tensor or value.is_meta) for value in values)


# What a mask function of transformers says

#: What a rule may be: None masks nothing.
Rule = Causal | Window | Segments | None


def parts_of(mask_function: Any) -> Parts | None:
    """What it is made of; None where that is not all of transformers' own."""
    if getattr(mask_function, "__module__", None) != _HOST:
        return None
    name = mask_function.__qualname__.partition(".")[0]
    cells = mask_function.__closure__ or ()
    held = dict(zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in cells)))
    if name != "and_masks":
        return {name: held}
    parts: Parts = {}
    for part in held["mask_functions"]:
        of_part = parts_of(part)
        if of_part is None or parts.keys() & of_part.keys():
            return None
        parts |= of_part
    return parts


def rule_of(parts: Parts, q_length: int, kv_length: int, diagonal: int) -> tuple[Rule] | None:
    """`(rule,)`, bound and normalized, where the parts are understood; else None.

    `diagonal` is the key at the position of query 0.
    """
    if parts.keys() == {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}:
        if diagonal or q_length != kv_length:
            return None
        within = band_of(parts_of(parts["remap_positions_for_packed_sequence"]["mask_function"]) or {})
        documents = parts["packed_sequence_mask_function"]["packed_sequence_mask"]
        # Each batch entry may be packed in its own way; a bias is packed in one.
        if within is None or bool((documents != documents[:1]).any()):
            return None
        lengths = torch.unique_consecutive(documents[0], return_counts=True)[1].tolist()
        return (Segments(lengths, within=within[0]).bind(q_length, kv_length).normalize(),)
    understood = band_of(parts)
    if understood is None or (band := understood[0]) is None:
        return understood
    if diagonal not in (0, kv_length - q_length):
        return None
    corner: Corner = "bottom-right" if diagonal else "top-left"
    rule = Causal(corner) if isinstance(band, Causal) else Window(band.left, band.right, corner)
    return (rule.bind(q_length, kv_length).normalize(),)


def band_of(parts: Parts) -> tuple[Causal | Window | None] | None:
    """`(band,)`, without a corner, where the parts say what lies around the diagonal; else None."""
    names = parts.keys()
    if names == {"causal_mask_function"}:
        return (Causal(),)
    if names == {"bidirectional_mask_function"}:
        return (None,)
    if names == {"sliding_window_overlay", "causal_mask_function"}:
        size = parts["sliding_window_overlay"]["sliding_window"]
        return (Window(size - 1, 0),) if type(size) is int and size > 0 else None
    if names == {"sliding_window_bidirectional_overlay", "bidirectional_mask_function"}:
        size = parts["sliding_window_bidirectional_overlay"]["sliding_window"]
        return (Window(size, size),) if type(size) is int and size >= 0 else None
    return None
