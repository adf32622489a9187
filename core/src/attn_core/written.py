"""Dense forms that were written out before: every layer of a model asks for the same one.

Only of biases that hold no data, whose dense form is a constant. The least lately used goes first where the bound is
reached; what is larger than half of it is never kept, so a long mask costs its memory only while it is used.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from .bias import AttnBias
from .tracing import is_traced

_modes_of_dispatch = torch._C._len_torch_dispatch_stack

#: Bytes that may be held for this.
LIMIT = 64 << 20

_kept: OrderedDict[Hashable, Tensor] = OrderedDict()
_lock = threading.Lock()


def written_out(bias: AttnBias, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`bias.checked_dense(device, dtype)`, which nobody may write into."""
    # In a graph it is a constant of the graph; what is made in inference mode cannot be saved for a backward; and in a
    # mode of dispatch tensors may be stand-ins, which nothing kept goes with.
    if bias.holds_data or is_traced() or torch.is_inference_mode_enabled() or _modes_of_dispatch():
        return bias.checked_dense(device, dtype)
    key = bias.key, device, dtype
    with _lock:
        dense = _kept.get(key)
        if dense is not None:
            _kept.move_to_end(key)
            return dense
    dense = bias.checked_dense(device, dtype)
    plain = type(dense) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(dense)
    if plain and dense.nbytes <= LIMIT // 2:  # no stand-in without data, and nothing that ends with a transform
        with _lock:
            _kept[key] = dense
            while sum(tensor.nbytes for tensor in _kept.values()) > LIMIT:
                _kept.popitem(last=False)
    return dense


def is_kept(bias: AttnBias, dtype: torch.dtype) -> bool:
    """Whether the next call outside a graph finds the dense form of this bias, whose elements are of `dtype`."""
    seqlen_q, seqlen_kv = bias.bound_lengths()
    batch, num_heads = bias.batch_and_heads
    return not bias.holds_data and batch * num_heads * seqlen_q * seqlen_kv * dtype.itemsize <= LIMIT // 2


def forget_written() -> None:
    """Lets go of all of them."""
    with _lock:
        _kept.clear()
