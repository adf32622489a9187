"""What neighborhood attention multiplies and adds, from shapes alone.

    qk   2 * batch * num_heads * tokens * width * head_dim            query · key
    av   2 * batch * num_heads * tokens * width * head_dim_v          weights · value
    width = product of kernel_size, and the additional tokens

Only matrix products count: no softmax, scale, bias or mask. So a causal axis takes nothing away, and stride and
dilation change nothing. A multiply-accumulate (MAC) is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from attn_core.errors import InputError

from ..arguments import CausalPerAxis, PerAxis, window

RANKS = (1, 2, 3)


class ShapeError(InputError, AssertionError):
    """Shapes that are not those of one call; an AssertionError, as NATTEN raises for them."""


class Sizes(NamedTuple):
    """What the count of a call depends on."""

    batch: int
    num_heads: int
    tokens: int
    width: int  #: weights of a query
    head_dim: int

    @property
    def macs(self) -> int:
        """Of one of the two matrix products."""
        return self.batch * self.num_heads * self.tokens * self.width * self.head_dim


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    is_causal: CausalPerAxis | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional_tokens: int = 0,
) -> int:
    """FLOPs of one attention: both matrix products.

    Args:
        q_shape, k_shape, v_shape: `[batch, *spatial, num_heads, head_dim]` with `is_heads_last`, as fused calls have
            them, else `[batch, num_heads, *spatial, head_dim]`; 1 to 3 spatial axes, all three the same.
        kernel_size, dilation, is_causal: one value, or one for each axis; the latter two change nothing.
        return_macs: count a multiplication and its addition as one.
        additional_tokens: keys and values that every query sees beside its window (`additional_keys`); NATTEN leaves
            them out.

    Raises:
        ShapeError: shapes that differ, or of another rank; an AssertionError.
        InputError: parameters of another type or number.
    """
    _check_same(q_shape=q_shape, k_shape=k_shape, v_shape=v_shape)
    sizes = _sizes("q_shape", q_shape, kernel_size, dilation, is_causal, is_heads_last, additional_tokens)
    return 2 * _count(sizes, return_macs)


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    is_causal: CausalPerAxis | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional_tokens: int = 0,
) -> int:
    """FLOPs of the weights, query · key: half of `fna_flop_count`. Takes and raises what that does."""
    _check_same(q_shape=q_shape, k_shape=k_shape)
    sizes = _sizes("q_shape", q_shape, kernel_size, dilation, is_causal, is_heads_last, additional_tokens)
    return _count(sizes, return_macs)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    is_causal: CausalPerAxis | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    additional_tokens: int = 0,
) -> int:
    """FLOPs of weights · value.

    Args:
        a_shape: the shape of the weights, `v_shape` but for its last dimension, which is the width: the product of
            kernel_size, and `additional_tokens`.

    Otherwise takes and raises what `fna_flop_count` does.
    """
    sizes = _sizes("v_shape", v_shape, kernel_size, dilation, is_causal, is_heads_last, additional_tokens)
    wanted = (*v_shape[:-1], sizes.width)
    if tuple(a_shape) != wanted:
        raise ShapeError(
            f"a_shape: must be v_shape with {sizes.width} weights in place of its last dimension, {wanted}; got"
            f" {tuple(a_shape)}"
        )
    return _count(sizes, return_macs)


def _count(sizes: Sizes, return_macs: bool) -> int:
    return sizes.macs if return_macs else 2 * sizes.macs


def _check_same(**shapes: Sequence[int]) -> None:
    if len({tuple(shape) for shape in shapes.values()}) != 1:
        got = ", ".join(f"{name}={tuple(shape)}" for name, shape in shapes.items())
        raise ShapeError(f"{', '.join(shapes)}: must be equal, got {got}")


def _sizes(
    name: str,
    shape: Sequence[int],
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    is_causal: CausalPerAxis | None,
    is_heads_last: Any,
    additional_tokens: Any,
) -> Sizes:
    rank = len(shape) - 3
    if rank not in RANKS:
        raise ShapeError(f"{name}: takes a shape of 4, 5 or 6 dimensions, got {len(shape)}: {tuple(shape)}")
    if not isinstance(is_heads_last, bool):
        raise InputError(f"is_heads_last: takes True or False, got {is_heads_last!r}")
    if isinstance(additional_tokens, bool) or not isinstance(additional_tokens, int) or additional_tokens < 0:
        raise InputError(f"additional_tokens: takes an int >= 0, got {additional_tokens!r}")
    kernels, *_ = window(rank, kernel_size, dilation=dilation, is_causal=is_causal)
    batch, *inner, head_dim = shape
    heads, spatial = (inner[-1], inner[:-1]) if is_heads_last else (inner[0], inner[1:])
    return Sizes(batch, heads, prod(spatial), prod(kernels) + additional_tokens, head_dim)
