"""Unfused calls as one op each, in a trace of torch.jit: fvcore finds them there and counts them.

Such a trace takes no list of bools, and makes tensors of what is read from a shape. So all of a call is inside of the
op, which is what it does: gradients flow through it, and the traced graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..arguments import window

_library = torch.library.Library("attn_natten", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "whole_qk(Tensor query, Tensor key, Tensor? additional_keys, Tensor? rpb, int[] kernel_size, int[] dilation,"
    " int[] is_causal) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "whole_av(Tensor attn, Tensor value, Tensor? additional_values, int[] kernel_size, int[] dilation,"
    " int[] is_causal) -> Tensor"
)


def qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    dilation: Any,
    additional_keys: Tensor | None,
    is_causal: Any,
    rpb: Tensor | None,
) -> Tensor:
    """`unfused.calls.qk`, as one op."""
    parameters = _as_ints(rank, kernel_size, dilation, is_causal)
    attn: Tensor = torch.ops.attn_natten.whole_qk(query, key, additional_keys, rpb, *parameters)
    return attn


def av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any,
    additional_values: Tensor | None,
    is_causal: Any,
) -> Tensor:
    """`unfused.calls.av`, as one op."""
    parameters = _as_ints(rank, kernel_size, dilation, is_causal)
    out: Tensor = torch.ops.attn_natten.whole_av(attn, value, additional_values, *parameters)
    return out


def _as_ints(rank: int, kernel_size: Any, dilation: Any, is_causal: Any) -> list[list[int]]:
    kernels, _, dilations, causal = window(rank, kernel_size, dilation=dilation, is_causal=is_causal)
    return [list(kernels), list(dilations), list(map(int, causal))]


def _qk(
    query: Tensor,
    key: Tensor,
    additional_keys: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    from ..unfused import calls  # which imports this module

    causal = tuple(map(bool, is_causal))
    rank = query.ndim - 3
    return calls.qk(rank, query, key, tuple(kernel_size), tuple(dilation), additional_keys, causal, rpb, None)


def _av(
    attn: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    from ..unfused import calls

    causal = tuple(map(bool, is_causal))
    rank = value.ndim - 3
    return calls.av(rank, attn, value, tuple(kernel_size), tuple(dilation), additional_values, causal, None)


_library.impl("whole_qk", _qk, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("whole_av", _av, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def macs(grid: Sequence[int], additional: Sequence[int] | None, kernel_size: Sequence[int]) -> int:
    """Multiply-accumulates of either call, for query or value `[batch, num_heads, *spatial, head_dim]`."""
    return prod(grid) * (prod(kernel_size) + (0 if additional is None else additional[2]))
