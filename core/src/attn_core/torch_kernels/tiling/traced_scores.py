"""The op of `traced`, with scores: their rules are written as a string, too, and the tensors that they hold are
operands, each with its gradient."""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...bias import ALiBi, AttnBias, Mask, RelPosTable, Score
from ...tracing import constant
from . import function
from .cut import WIDE
from .scores import Scores
from .traced import as_text, read

#: Kinds of scores that can be written down.
KINDS = ("ALiBi", "RelPosTable")

_library = torch.library.Library("attn_core", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tiled_scores(Tensor query, Tensor key, Tensor value, Tensor[] held, str mask, str scores, float scale)"
    " -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "tiled_scores_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor[] held, bool[] wanted, str mask, str scores, float scale) -> Tensor[]"
)


def tiled(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scores: tuple[AttnBias, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """`function.Tiled` of rules that `can_be_written`, as one op."""
    held = [tensor for rule in scores for tensor in rule.held().values()]
    rules = written(tuple([_parameters(rule) for rule in scores]))
    out, lse = torch.ops.attn_core.tiled_scores(query, key, value, held, as_text(mask), rules, scale)
    return out, lse


def can_be_written(scores: tuple[AttnBias, ...]) -> bool:
    """Whether they can be an argument of the op."""
    return all(type(rule) is ALiBi or type(rule) is RelPosTable for rule in scores)


def _parameters(rule: AttnBias) -> tuple[Any, ...]:
    """Constants of the graph: (kind, what its constructor takes beside tensors)."""
    if isinstance(rule, ALiBi):
        return "ALiBi", operator.index(rule.num_heads), rule.slopes is not None, rule.corner
    assert isinstance(rule, RelPosTable)
    extents, dilation = (tuple(map(operator.index, sizes)) for sizes in (rule.extents, rule.dilation))
    return "RelPosTable", extents, dilation


@constant
def written(rules: tuple[tuple[Any, ...], ...]) -> str:
    return repr(rules)


def read_scores(text: str, held: Sequence[Tensor], lengths: tuple[int, int]) -> Scores:
    """The rules that were written, holding these tensors, at these lengths."""
    tensors = iter(held)
    rules: list[Score] = []
    for kind, *values in ast.literal_eval(text):
        if kind == "ALiBi":
            num_heads, has_slopes, corner = values
            rules.append(ALiBi(num_heads, next(tensors) if has_slopes else None, corner, lengths))
        else:
            extents, dilation = values
            rules.append(RelPosTable(next(tensors), extents, dilation, lengths))
    return Scores(tuple(rules))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, held: list[Tensor], mask: str, scores: str, scale: float
) -> tuple[Tensor, Tensor]:
    lengths = query.shape[2], key.shape[2]
    rules = read_scores(scores, held, lengths)
    return function.forward(query, key, value, read(mask, lengths), scale, rules, held)


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
    mask: str,
    scores: str,
    scale: float,
) -> list[Tensor]:
    lengths = query.shape[2], key.shape[2]
    rules = read_scores(scores, held, lengths)
    operands = grad_out, grad_lse, query, key, value, out, lse, read(mask, lengths), scale, rules, held, wanted
    return list(function.backward(*operands))


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
    query, key, value, held, ctx.mask, ctx.scores, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *held)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *held = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    wanted = list(ctx.needs_input_grad[3])
    to_query, to_key, to_value, *rest = torch.ops.attn_core.tiled_scores_backward(
        grad_out, grad_lse, query, key, value, out, lse, held, wanted, ctx.mask, ctx.scores, ctx.scale
    )
    found = iter(rest)
    return to_query, to_key, to_value, [next(found) if want else None for want in wanted], None, None, None


for _name, _run, _fake in (
    ("tiled_scores", _forward, _fake_forward),
    ("tiled_scores_backward", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attn_core::{_name}", _fake, lib=_library)
torch.library.register_autograd("attn_core::tiled_scores", _gradients, setup_context=_setup, lib=_library)
