"""Runs a pair of operators by xFormers' own front end, which checks what it is sent once more.

Three of its functions: with gradients, for the LSE, and for the output alone. The one with gradients looks at query,
key and value only; where the bias alone is trained, it would take the call for one without gradients, so that there
query is passed as if it were trained.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from attn_core import AttnBias
from torch import Tensor

from .. import library
from . import asked, empty_rows
from .forms import Form, forms
from .lse import ours
from .operands import Sent, sent
from .operators import Pair


def run(
    pair: Pair,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    scale: float,
    dropout_p: float,
    return_lse: bool,
) -> Any:
    """Heads-last: `[batch, seqlen, num_heads, head_dim]`; with `return_lse`, `(out, lse)`."""
    batch, seqlen_q = query.shape[:2]
    operands_trained = query.requires_grad or key.requires_grad or value.requires_grad
    training = torch.is_grad_enabled() and (operands_trained or (bias is not None and bias.requires_grad))
    if training and not operands_trained:
        query = query.detach().requires_grad_()
    given = asked.scale_of(scale, query.shape[3])
    form, x = chosen(pair, query, key, value, bias, training, dropout_p, given)
    fmha = library.XFORMERS.module()
    lse = None
    if return_lse:
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            x.query, x.key, x.value, x.attn_bias, 0.0, given, op=pair.forward
        )
    elif training:
        pairs = (pair.forward, pair.backward)
        out = fmha.memory_efficient_attention(x.query, x.key, x.value, x.attn_bias, dropout_p, given, op=pairs)
    else:
        out = fmha.memory_efficient_attention_forward(
            x.query, x.key, x.value, x.attn_bias, dropout_p, given, op=pair.forward
        )
    out = out.reshape(batch, seqlen_q, query.shape[2], value.shape[3])
    empty = None if pair.manners.rows_without_keys else empty_rows.by_lengths(bias, seqlen_q, query.device)
    if empty is not None:
        out = out.masked_fill(empty[:, :, None, None], 0)
    if lse is None:
        return out
    is_packed = pair.forward.VARLEN_LSE_PACKED
    lse = ours(lse, x, packed=form.packed, batch=batch, seqlen_q=seqlen_q, is_packed_lse=is_packed)
    of_tensor = empty_rows.by_tensor(bias, query.dtype)
    for rows in (None if empty is None else empty[:, None], of_tensor):
        lse = lse if rows is None else lse.masked_fill(rows, -float("inf"))
    return out, lse


#: What a call looks like -> the class that says its bias to the operators. They answer by shapes and dtypes, as strides
#: are mended before.
_kinds: dict[Hashable, str] = {}
KEPT = 4096


def chosen(
    pair: Pair,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    training: bool,
    dropout_p: float,
    scale: float | None,
) -> tuple[Form, Sent]:
    """The first form of the bias that the operators take, and the operands in it."""
    of_bias = None if bias is None else bias.key
    options = (training, dropout_p, scale, torch.are_deterministic_algorithms_enabled())
    facts = (pair, of_bias, query.shape, key.shape, value.shape, query.dtype, query.device, *options)
    known = _kinds.get(facts)
    possible = [
        form
        for form in forms(bias, query.shape[0], query.shape[1], key.shape[1])
        if (form.kind == known if known is not None else asked.allowed(pair, form, training))
    ]
    raised: Exception | None = None
    for form in possible:
        try:
            operands = sent(query, key, value, form)
        except (ValueError, RuntimeError) as error:
            raised = error
            continue
        if form is possible[-1] or _are_taken(pair, operands, training, dropout_p, scale):
            if len(_kinds) == KEPT:
                _kinds.clear()
            _kinds[facts] = form.kind
            return form, operands
    raise raised or ValueError(f"{pair.forward.NAME} has no form for {bias!r}")


def _are_taken(pair: Pair, operands: Sent, training: bool, dropout_p: float, scale: float | None) -> bool:
    operators = (pair.forward, pair.backward) if training else (pair.forward,)
    return not any(asked.reasons(operator, operands, dropout_p, scale) for operator in operators)
