"""The same as one op of torch.library, for graphs.

Traced as plain ops, tiles would be counted by guards on the lengths, and their tables made anew in each graph. So a
graph has one op, with flat arguments: the mask is written as a string, its lengths are those of the operands.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

import torch
from torch import Tensor

from ...bias import Causal, Intersection, Mask, Neighborhood, PrefixLM, Segments, Window
from ...bias.zero_padded import ZeroPadded
from ...tracing import constant
from . import function
from .cut import WIDE

#: Kinds that can be written down: those of the core that hold no tensors.
KINDS: dict[str, type[Mask]] = {
    kind.__name__: kind for kind in (Causal, Intersection, Neighborhood, PrefixLM, Segments, Window, ZeroPadded)
}

#: What is written where there is none.
NO_MASK = "None"

_library = torch.library.Library("attn_core", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "tiled(Tensor query, Tensor key, Tensor value, str mask, float scale) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "tiled_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " str mask, float scale) -> (Tensor, Tensor, Tensor)"
)


def tiled(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> tuple[Tensor, Tensor]:
    """`function.Tiled`, as one op."""
    out, lse = torch.ops.attn_core.tiled(query, key, value, as_text(mask), scale)
    return out, lse


def as_text(mask: Mask | None) -> str:
    """A mask that `can_be_written`, as the op takes it."""
    return NO_MASK if mask is None else written(type(mask), _constants(mask.facts()))


def can_be_written(mask: Mask | None) -> bool:
    """Whether a mask can be an argument of the op."""
    if mask is None:
        return True
    if isinstance(mask, PrefixLM) and isinstance(mask.prefix, Tensor):  # one for each batch entry
        return False
    parts = mask.parts if isinstance(mask, Intersection) else (mask.padded,) if isinstance(mask, ZeroPadded) else ()
    return type(mask) in KINDS.values() and all(map(can_be_written, parts))


@constant
def written(kind: type[Mask], facts: tuple[Any, ...]) -> str:
    """A mask without its lengths, as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return {value.__name__} if isinstance(value, type) else value

    return repr(plain((kind, facts)))


def read(text: str, lengths: tuple[int, int]) -> Mask | None:
    """The mask that was written, at these lengths."""
    if text == NO_MASK:
        return None

    def kinds(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kinds, value))
        return KINDS[next(iter(value))] if isinstance(value, set) else value

    kind, facts = kinds(ast.literal_eval(text))
    mask: Mask = kind.from_facts(facts, 1, 1, lengths)
    return mask


def _constants(facts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Facts with symbolic numbers made constants of the graph, at any depth."""
    made: list[Any] = []
    for fact in facts:
        if isinstance(fact, tuple):
            made.append(_constants(fact))
        elif isinstance(fact, (int, torch.SymInt)) and not isinstance(fact, bool):
            made.append(operator.index(fact))
        else:
            made.append(fact)
    return tuple(made)


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float) -> tuple[Tensor, Tensor]:
    return function.forward(query, key, value, read(mask, (query.shape[2], key.shape[2])), scale)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = read(mask, (query.shape[2], key.shape[2]))
    to_query, to_key, to_value = function.backward(grad_out, grad_lse, query, key, value, out, lse, bias, scale)
    return to_query, to_key, to_value


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=WIDE.get(query.dtype, query.dtype))
    return torch.empty_like(query), lse


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.attn_core.tiled_backward(grad_out, grad_lse, query, key, value, out, lse, ctx.mask, ctx.scale)
    return *grads, None, None


for _name, _run, _fake in (("tiled", _forward, _fake_forward), ("tiled_backward", _backward, _fake_backward)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attn_core::{_name}", _fake, lib=_library)
torch.library.register_autograd("attn_core::tiled", _gradients, setup_context=_setup, lib=_library)
