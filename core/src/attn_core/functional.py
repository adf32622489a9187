"""The calls: attention, and the drop-in for torch's scaled_dot_product_attention."""

from __future__ import annotations

import sys
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .bias import AttnBias, Causal
from .by_methods import with_causal
from .dispatch import ATTENTION, PLAIN, SDPA, SDPA_GQA, call
from .errors import InputError
from .tensor_mask import notice, notice_traced
from .tensor_mask import seen as _seen_places
from .trace import traced

_is_tracing = torch.compiler.is_dynamo_compiling
_TOP_LEFT = Causal("top-left")
_frame = sys._getframe


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    kernel: str | None = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    kernel: str | None = None,
) -> Any:
    """Attention by the best kernel that takes the problem.

        logits = softcap(scale * query · key) + bias
        out    = softmax(logits) · value

    Args:
        query: `[batch, seqlen_q, num_heads, head_dim]`, floating.
        key: `[batch, seqlen_kv, num_kv_heads, head_dim]`; query head h reads key head
            `h // (num_heads // num_kv_heads)`.
        value: `[batch, seqlen_kv, num_kv_heads, head_dim_v]`.
        bias: a bias, or a tensor: boolean (True = may attend) or floating (added to the logits; only -inf masks).
        scale: default `head_dim ** -0.5`; 0.0 is honoured.
        softcap: c > 0 bounds the scaled logits to (-c, c) by `c * tanh(x / c)`, before the bias.
        dropout_p: probability in [0, 1) of dropping a weight, also outside training.
        return_lse: also return the log-sum-exp of the logits.
        kernel: insist on this one, by name.

    Returns:
        `out`, `[batch, seqlen_q, num_heads, head_dim_v]` in query's dtype; with `return_lse`, `(out, lse)`, lse
        `[batch, num_heads, seqlen_q]` in float32 (float64 for float64), natural log. A query with no allowed key gets
        out 0, lse -inf and gradient 0.

    Raises:
        InputError, InputTypeError: arguments that do not fit together.
        UnknownKernelError, KernelRefusedError: `kernel` is unknown, or refuses; with all its reasons.
        NoKernelError: no kernel takes the problem; with every kernel's reasons.
    """
    if _is_tracing():
        return traced(ATTENTION, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)
    return call(ATTENTION, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: AttnBias | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal: bool | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with its signature, by the best kernel that takes the problem.

    Operands are `[..., seqlen, head_dim]` with any leading dimensions, heads before the sequence. `is_causal=True` has
    its corner at the top left, as in torch; `causal` is another name of it. `attn_mask` may also be a bias; a plain
    tensor is deprecated, and warned of as ATTN_TENSOR_MASK says. Tensors that the core does not model (nested, DTensor
    and other subclasses) are handed to torch unchanged.

    Raises what `attention` raises, and InputError for `is_causal=True` beside a plain tensor or a bias that is causal
    by itself (any other bias is taken together with it), or where `is_causal` and `causal` disagree.
    """
    bias: Any = attn_mask
    if causal is not None:
        is_causal = _agreed(is_causal, causal)
    if is_causal:
        bias = _TOP_LEFT if attn_mask is None else with_causal(attn_mask, query)
    door = SDPA_GQA if enable_gqa else SDPA
    if _is_tracing():
        if attn_mask is not None and type(attn_mask) in PLAIN:
            notice_traced()
        return traced(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]
    if attn_mask is not None and type(attn_mask) in PLAIN:
        frame = _frame(1)
        if id(frame.f_code) + frame.f_lasti not in _seen_places:
            notice(frame)
    return call(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]


def _agreed(is_causal: bool, causal: bool) -> bool:
    """The one of two names that was given. Raises InputError where they disagree; `is_causal=False` says nothing."""
    if is_causal and not causal:
        raise InputError("is_causal, causal: two names of one argument, got True and False")
    return causal
