"""What a pair of operators can do, read from their class attributes, and from what they answer of sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from attn_core import Backward, Cached, Capabilities, Causal, KeyPadding, Problem, Segments, TensorBias, Window
from attn_core.bias import Sum
from attn_core.bias.zero_padded import ZeroPadded
from attn_core.capabilities import BiasKind

from . import asked
from .forms import NO_BIAS, TENSOR, Form, forms
from .operators import Manners, Pair

#: Float8 tensors come with scales of their own, which nothing here gives.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
#: Sizes up to this are asked for one by one; what is regular so far goes on.
LARGEST_ASKED = 512
STEP = 8

TOP_LEFT, BOTTOM_RIGHT = Causal("top-left"), Causal("bottom-right")

#: xFormers' class -> what of ours it may say.
SAYS: dict[str, frozenset[BiasKind]] = {
    TENSOR: frozenset({TensorBias}),
    "LowerTriangularMask": frozenset({TOP_LEFT}),
    "LowerTriangularMaskWithTensorBias": frozenset({Sum}),
    "LowerTriangularFromBottomRightMask": frozenset({BOTTOM_RIGHT}),
    "LowerTriangularFromBottomRightLocalAttentionMask": frozenset({Window}),
    "LocalAttentionFromBottomRightMask": frozenset({Window, TOP_LEFT, BOTTOM_RIGHT}),
    "BlockDiagonalMask": frozenset({Segments}),
    "BlockDiagonalCausalMask": frozenset({Segments, TOP_LEFT}),
    "BlockDiagonalCausalFromBottomRightMask": frozenset({Segments, BOTTOM_RIGHT}),
    "BlockDiagonalCausalLocalAttentionMask": frozenset({Segments, Window}),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": frozenset({Segments, Window}),
    "BlockDiagonalGappyKeysMask": frozenset({Segments}),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": frozenset({Segments}),
    "BlockDiagonalPaddedKeysMask": frozenset({KeyPadding}),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": frozenset({Cached}),
    "BlockDiagonalLocalAttentionPaddedKeysMask": frozenset({Cached}),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": frozenset({Cached}),
}
#: The same of an operator that takes no tensor: sequences that fill their room have these masks.
INSTEAD_OF_TENSOR: dict[str, frozenset[BiasKind]] = {
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": frozenset({BOTTOM_RIGHT}),
    "BlockDiagonalLocalAttentionPaddedKeysMask": frozenset({Window, TOP_LEFT, BOTTOM_RIGHT}),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": frozenset({Window}),
}
#: Of an operator that masks padding only: these wait until it was zeroed.
PADDED: frozenset[BiasKind] = frozenset({KeyPadding, Cached})


@functools.cache
def capabilities(
    pair: Pair, dtype: torch.dtype | None = None, device: str | None = None, capability: tuple[int, int] | None = None
) -> Capabilities:
    """What the pair can do with operands of that dtype on such a device; None: the first that it takes."""
    forward, backward = pair.forward, pair.backward
    dtypes = frozenset(forward.SUPPORTED_DTYPES) & DTYPES
    of_size = next(
        each for each in (dtype, torch.float32, torch.bfloat16, torch.float16) if each is not None and each in dtypes
    )
    of_device = device if device in forward.SUPPORTED_DEVICES else min(forward.SUPPORTED_DEVICES)
    where = asked.device_of(str(of_device), capability)
    plain = plain_form(pair)
    dims, dims_v = sizes(forward, plain, of_size, where)
    on_rocm = torch.version.hip is not None  # whose devices have numbers of their own, which no operator limits
    return Capabilities(
        devices=frozenset(forward.SUPPORTED_DEVICES),
        dtypes=dtypes,
        head_dims=dims,
        head_dims_v=dims_v,
        biases=kinds(forward, pair.manners),
        backward=None if backward is None else _backward(pair, plain, of_size, where, dims, dims_v),
        gqa=forward.SUPPORTS_BMGHK,
        dropout=forward.SUPPORTS_DROPOUT,
        return_lse=pair.manners.gives_lse,
        deterministic=forward.IS_DETERMINISTIC,
        min_compute_capability=None if on_rocm else tuple(forward.CUDA_MINIMUM_COMPUTE_CAPABILITY),
        max_compute_capability=None if on_rocm else forward.CUDA_MAXIMUM_COMPUTE_CAPABILITY,
    )


def plain_form(pair: Pair) -> Form:
    """What a pair is asked with about sizes: no bias, or lengths where it needs some."""
    possible = [form for form in forms(None, 1, 64, 64) if asked.allowed(pair, form, False)]
    return possible[0] if possible else Form(kind=NO_BIAS)


def _backward(
    pair: Pair,
    plain: Form,
    dtype: torch.dtype,
    where: torch.device | None,
    dims_of_forward: Collection[int],
    dims_v_of_forward: Collection[int] | None,
) -> Backward:
    backward = pair.backward
    dims, dims_v = sizes(backward, plain, dtype, where)
    dtypes = frozenset(backward.SUPPORTED_DTYPES) & DTYPES
    biases = kinds(backward, pair.manners)
    return Backward(
        dtypes=dtypes,
        head_dims=None if dims == dims_of_forward else dims,
        head_dims_v=None if dims_v == dims_v_of_forward else dims_v or (),
        biases=biases,
        gqa=bool(backward.SUPPORTS_BMGHK),
        bias_grad=bool(backward.SUPPORTS_ATTN_BIAS_GRAD) and TensorBias in biases,
        deterministic=backward.IS_DETERMINISTIC,
        min_compute_capability=None if torch.version.hip else tuple(backward.CUDA_MINIMUM_COMPUTE_CAPABILITY),
    )


def kinds(operator: Any, manners: Manners) -> frozenset[BiasKind]:
    """The kinds of ours that an operator's classes say, at some lengths at least."""
    says: set[BiasKind] = set()
    names = {each.__name__ for each in operator.SUPPORTED_ATTN_BIAS_TYPES}
    for name in names:
        says |= SAYS.get(name, frozenset())
        if TENSOR not in names:
            says |= INSTEAD_OF_TENSOR.get(name, frozenset())
    if not manners.never_reads_padding and says & PADDED:
        says = says - PADDED | {ZeroPadded}
    if says >= {TOP_LEFT, BOTTOM_RIGHT}:
        says = says - {TOP_LEFT, BOTTOM_RIGHT} | {Causal}
    return frozenset(says)


def sizes(
    operator: Any, plain: Form, dtype: torch.dtype, where: torch.device | None
) -> tuple[Collection[int], Collection[int] | None]:
    """The head_dims that an operator takes in the plainest problem of that dtype, and the head_dims_v; None where that
    must be the same."""
    takes = _asker(operator, plain, dtype, where)
    dims = _taken(operator, takes)
    base = 64 if 64 in dims else min(dims)
    if not operator.SUPPORTS_DIFFERENT_VALUE_EMBED or not any(takes(base, base * n) for n in (2, 3, 4)):
        return dims, None
    return dims, _taken(operator, lambda dim_v: takes(base, dim_v))


def _taken(operator: Any, takes: Callable[[int], bool]) -> Collection[int]:
    """Those between the operator's own limits: a range where they are regular as far as was asked."""
    low, high = max(1, int(operator.SUPPORTED_MIN_K)), int(operator.SUPPORTED_MAX_K)
    whole = [dim for dim in range(STEP, min(high, LARGEST_ASKED) + 1, STEP) if dim >= low]
    found = [dim for dim in whole if takes(dim)]
    if found != whole or not found:
        return frozenset(found or [dim for dim in range(low, min(high, LARGEST_ASKED) + 1) if takes(dim)] or {high})
    step = next((step for step in (1, 2, 4) if found[-1] - step >= low and takes(found[-1] - step)), STEP)
    return range(-(-low // step) * step, high + 1, step)


def _asker(operator: Any, plain: Form, dtype: torch.dtype, where: torch.device | None) -> Callable[..., bool]:
    """Whether it takes that head_dim, and head_dim_v. Without such a device, by what it says of shapes alone."""
    if where is None:
        return lambda dim, dim_v=None: not operator.shape_not_supported_reasons(Mq=64, Mkv=64, K=dim, Kv=dim_v or dim)

    def asks(dim: int, dim_v: int | None = None) -> list[str]:
        problem = Problem(
            batch=1,
            seqlen_q=64,
            seqlen_kv=64,
            num_heads=1,
            num_kv_heads=1,
            head_dim=dim,
            head_dim_v=dim_v or dim,
            dtype=dtype,
            device=where.type,
        )
        return asked.reasons(operator, asked.stand_ins(problem, plain, where), 0.0, None)

    #: What stands against any size, as a dtype that this device does not have.
    always = set(asks(64)) & set(asks(128)) & set(asks(STEP))
    return lambda dim, dim_v=None: not set(asks(dim, dim_v)) - always


def widest(backward: bool, manners: Manners) -> Capabilities:
    """What is declared of an operator before xFormers was imported: all that this plugin can translate. What the
    operator says counts from the moment at which it is first weighed."""
    return Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=DTYPES,
        head_dims=range(1, (1 << 16) + 1),
        head_dims_v=range(1, (1 << 16) + 1),
        biases=frozenset({Causal, Window, Segments, KeyPadding, Cached, ZeroPadded, TensorBias, Sum}),
        backward=Backward(bias_grad=True, deterministic=True) if backward else None,
        gqa=True,
        dropout=True,
        return_lse=manners.gives_lse,
        deterministic=True,
    )
