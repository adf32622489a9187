"""What `qk` and `av` are for tensors that users have: cast under autocast, and with forward-mode tangents.

Both are linear in each operand, so the tangent of a product is the sum of two products; a missing tangent is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments import has_tangents
from . import ops
from .products import Window
from .transforms import call_one

Product = Callable[[Tensor, Tensor], Tensor]


def weights(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """`[batch, num_heads, *spatial, width]`; -inf in slots without a key, whose tangent is 0."""

    def product(masked: float) -> Product:
        return lambda query, key: call_one(ops.qk, query, key, *window, masked)

    return _product(product(ops.MASKED), product(0.0), query, key)


def average(attn: Tensor, value: Tensor, window: Window) -> Tensor:
    """`[batch, num_heads, *spatial, head_dim]`."""

    def product(attn: Tensor, value: Tensor) -> Tensor:
        return call_one(ops.av, attn, value, *window)

    return _product(product, product, attn, value)


def _product(function: Product, of_tangents: Product, a: Tensor, b: Tensor) -> Tensor:
    if not has_tangents(a, b):
        return function(a, b)
    (a, a_tangent), (b, b_tangent) = (forward_ad.unpack_dual(operand) for operand in (a, b))  # type: ignore[no-untyped-call]
    if a_tangent is None:
        tangent = of_tangents(a, b_tangent)
    elif b_tangent is None:
        tangent = of_tangents(a_tangent, b)
    else:
        tangent = of_tangents(a_tangent, b) + of_tangents(a, b_tangent)
    dual: Tensor = forward_ad.make_dual(function(a, b), tangent)  # type: ignore[no-untyped-call]
    return dual


def as_under_autocast(tensor: Tensor) -> Tensor:
    """As autocast casts operands, where it is on: floating ones, but float64 never."""
    device = tensor.device.type
    if not torch.amp.autocast_mode.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor if tensor.dtype is torch.float64 else tensor.to(torch.get_autocast_dtype(device))
