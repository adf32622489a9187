"""Biases that are known by three methods alone: `materialize`, `needs_materialization` and `dispatch`.

A bias that materializes becomes a TensorBias at every call, and goes the way of every other. One that does not brings a
call of its own: nothing is chosen then, and what this library would do with a call (cast, check, adapt) is left to it,
but for what its `dispatch` has no argument for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bias import AttnBias, Causal, TensorBias, as_bias
from .errors import InputError, InputTypeError

#: What `record` and `explain` say of a call that no kernel of the registry serves.
REASON = "its own dispatch"


class Flagged(AttnBias):
    """A bias that brings its own call, with `is_causal=True` beside it."""

    def __init__(self, bias: AttnBias) -> None:
        self.bias = bias
        self.made_by = type(bias)

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        return self.bias.materialize(device)

    def needs_materialization(self) -> bool:
        return False

    @staticmethod
    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any,
        causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        bias = attn_bias.bias
        return bias.dispatch(query, key, value, bias, True, scale, dropout_p)  # type: ignore[no-any-return]


def name_of(bias: AttnBias) -> str:
    """`bias/<Class>`, as a kernel of that name would be."""
    return f"bias/{getattr(bias, 'made_by', type(bias)).__name__}"


def materialized(bias: Any, query: object) -> TensorBias:
    """What `bias` materializes on the device of `query`. Raises InputTypeError for what cannot be a bias."""
    dense = bias.materialize(query.device if isinstance(query, Tensor) else None)
    if not isinstance(dense, Tensor):
        raise InputTypeError(f"{type(bias).__name__}.materialize: must give a tensor, got {type(dense).__name__}")
    if dense.dtype is not torch.bool and not dense.is_floating_point():
        raise InputTypeError(
            f"{type(bias).__name__}.materialize: must give a boolean tensor (True = may attend) or a floating one"
            f" (added to the logits), got {dense.dtype}"
        )
    made = TensorBias(dense)
    object.__setattr__(made, "made_by", type(bias))
    return made


def by_its_rule(bias: AttnBias | None, query: object, who: str) -> AttnBias | None:
    """`bias`, as a kind that the core knows. Raises InputTypeError, naming `who` asks, where it brings its own call."""
    if bias is None or not bias.by_methods:
        return bias
    if bias.needs_materialization():
        return materialized(bias, query)
    raise InputTypeError(f"{who}: {type(bias).__name__} brings its own dispatch, which only a call can use")


def with_causal(bias: object, query: object) -> AttnBias:
    """`bias` beside `is_causal=True`: both at once.

    Raises InputError for a plain tensor, as torch does, and for a bias that is causal by itself.
    """
    if isinstance(bias, Tensor) and not isinstance(as_bias(bias), Causal):
        raise InputError("attn_mask: must be None where is_causal=True; put the causal mask into attn_mask instead")
    given = as_bias(bias)
    if given is None:
        return Causal("top-left")
    if given.by_methods:
        if not given.needs_materialization():
            return Flagged(given)
        given = materialized(given, query)
    if is_causal(given):
        raise InputError(f"is_causal: must be False beside {given!r}, which is causal by itself")
    return Causal("top-left") + given


def is_causal(bias: AttnBias) -> bool:
    """Whether the bias is a causal mask, or has one among its parts."""
    return isinstance(bias, Causal) or any(is_causal(part) for part in getattr(bias, "parts", ()))


def check_options(bias: AttnBias, softcap: float | None, return_lse: bool, kernel: str | None) -> None:
    """Raises InputError for what `dispatch` has no argument for: it would vanish."""
    if softcap is None and not return_lse and kernel is None:
        return
    unheard = [
        name
        for name, asked in (
            ("softcap", softcap is not None),
            ("return_lse", return_lse),
            ("kernel", kernel is not None),
        )
        if asked
    ]
    if unheard:
        name = name_of(bias).partition("/")[2]
        raise InputError(f"{', '.join(unheard)}: not for {name}, which brings its own dispatch, without such an option")


def group_of(query: Tensor, key: Tensor, heads: int) -> int:
    """How many query heads read one key head; 1 where they do not divide, which is for `dispatch` to say."""
    if query.ndim < 3 or key.ndim < 3:
        return 1
    num_heads, num_kv_heads = query.shape[heads], key.shape[heads]
    return 1 if not num_kv_heads or num_heads % num_kv_heads else num_heads // num_kv_heads


def dispatched(
    bias: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    dropout_p: float,
    heads_last: bool,
    gqa: bool,
) -> Tensor:
    """Calls the bias's `dispatch`, which has torch's layout, from either door.

    Where `gqa`, key heads are repeated for it: it is not told how many query heads read one.
    """
    if heads_last:
        check_operands(query, key, value)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    group = group_of(query, key, -3) if gqa else 1
    if group != 1:
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    out = bias.dispatch(query, key, value, bias, False, scale, dropout_p)
    if not isinstance(out, Tensor) or (heads_last and out.ndim != 4):
        got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        name = name_of(bias).partition("/")[2]
        raise InputTypeError(f"{name}.dispatch: must give [batch, num_heads, seqlen_q, head_dim_v], got {got}")
    return out.transpose(1, 2) if heads_last else out


def check_operands(query: object, key: object, value: object) -> None:
    """Raises InputTypeError or InputError for what has no heads to bring forward."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{name}: takes a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            shape = list(tensor.shape)
            raise InputError(f"{name}: must be [batch, seqlen, num_heads, head_dim], got shape {shape}")
