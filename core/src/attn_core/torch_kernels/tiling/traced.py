"""The same as one op of torch.library, for graphs.

Traced as plain ops, tiles would be counted by guards on the lengths, and their tables made anew in each graph. And a
traced tensor has no values, which a mask of lengths or of blocks is cut by. So a graph has one op, with flat
arguments: a bias is text and the tensors that it holds, its lengths are those of the operands, and it is put together
and cut where the op runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...bias import AttnBias, Mask
from . import function
from .cut import WIDE
from .scores import Scores
from .written import put_together, taken_apart

_library = torch.library.Library("attn_core", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tiled(Tensor query, Tensor key, Tensor value, Tensor[] held, str bias, float scale) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "tiled_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor[] held, bool[] wanted, str bias, float scale) -> Tensor[]"
)


def tiled(query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, scale: float) -> tuple[Tensor, Tensor]:
    """`function.Tiled`, as one op, of a bias that can be written."""
    text, held = taken_apart(bias)
    out, lse = torch.ops.attn_core.tiled(query, key, value, held, text, scale)
    return out, lse


def bias_of(text: str, held: Sequence[Tensor], query: Tensor, key: Tensor) -> AttnBias | None:
    """The bias among the arguments of the op."""
    batch, heads, seqlen_q = query.shape[:3]
    return put_together(text, held, batch, heads, (seqlen_q, key.shape[2]))


def _read(
    text: str, held: Sequence[Tensor], query: Tensor, key: Tensor
) -> tuple[Mask | None, Scores | None, Sequence[Tensor]]:
    """Its mask, its scores, and the tensors that these hold."""
    bias = bias_of(text, held, query, key)
    if bias is None or not bias.scores:
        return (None if bias is None else bias.mask), None, ()
    scores = Scores(bias.scores)  # type: ignore[arg-type]
    return bias.mask, scores, held[: len(scores.held())]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, held: list[Tensor], bias: str, scale: float
) -> tuple[Tensor, Tensor]:
    mask, scores, of_scores = _read(bias, held, query, key)
    return function.forward(query, key, value, mask, scale, scores, of_scores)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    wanted: list[bool],
    bias: str,
    scale: float,
) -> list[Tensor]:
    mask, scores, of_scores = _read(bias, held, query, key)
    operands = grad_out, grad_lse, query, key, value, out, lse, mask, scale, scores, of_scores
    return list(function.backward(*operands, wanted[: len(of_scores)]))


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=WIDE.get(query.dtype, query.dtype))
    return torch.empty_like(query), lse


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    wanted: list[bool],
    *rest: Any,
) -> list[Tensor]:
    of_held = [torch.empty_like(tensor) for tensor, want in zip(held, wanted) if want]
    return [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *of_held]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, held, ctx.bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *held)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *held = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    wanted = list(ctx.needs_input_grad[3])
    to_query, to_key, to_value, *rest = torch.ops.attn_core.tiled_backward(
        grad_out, grad_lse, query, key, value, out, lse, held, wanted, ctx.bias, ctx.scale
    )
    found = iter(rest)
    return to_query, to_key, to_value, [next(found) if want else None for want in wanted], None, None


for _name, _run, _fake in (("tiled", _forward, _fake_forward), ("tiled_backward", _backward, _fake_backward)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attn_core::{_name}", _fake, lib=_library)
torch.library.register_autograd("attn_core::tiled", _gradients, setup_context=_setup, lib=_library)
