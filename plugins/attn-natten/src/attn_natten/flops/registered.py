"""The ops of this package and their formulas, registered with torch's counter. Imported when somebody counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..unfused import ops
from .counted import macs, macs_of_backward

Shape = Sequence[int]
_ops = torch.ops.attn_natten


@register_flop_formula(_ops.fna)
def fna_flops(
    query: Shape,
    key: Shape,
    value: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    kernel_size: Shape,
    *rest: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    """FLOPs of a fused call."""
    return 2 * macs(query, value, additional_keys, kernel_size)


@register_flop_formula(_ops.fna_backward)
def fna_backward_flops(
    grad_out: Shape,
    grad_lse: Shape | None,
    wanted: Any,
    query: Shape,
    key: Shape,
    value: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    kernel_size: Shape,
    *rest: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    """FLOPs of the backward of a fused call."""
    return 2 * macs_of_backward(query, value, additional_keys, kernel_size)


OPS = (_ops.fna, _ops.fna_backward, *ops.COUNTED)
