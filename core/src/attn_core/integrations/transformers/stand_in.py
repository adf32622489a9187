"""attn in place of the host's own function: what it cannot honour goes there, and `record` has the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ...dispatch import PLAIN
from ...record import STOCK, recording
from ...scope import current
from ...select import check_strict
from .forward import refusal
from .masks import LazyMask

Forward = Callable[..., tuple[Tensor, Any]]


def stand_in(
    forward: Forward, stock: Forward, harmless: Collection[str], is_standing_in: Callable[[], bool]
) -> Forward:
    """`forward`, and `stock` for the calls that it would refuse, or that attn is not to see."""

    def standing_in(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        reason = _why_not(query, key, value, attention_mask, kwargs, harmless)
        if reason is None and is_standing_in():
            return forward(module, query, key, value, attention_mask, **kwargs)
        mask = attention_mask.dense() if type(attention_mask) is LazyMask else attention_mask

        def run(query: Any, key: Any, value: Any, bias: Any) -> tuple[Tensor, Any]:
            return stock(module, query, key, value, mask, **kwargs)

        if reason is not None and not torch.compiler.is_compiling():
            scope = current.get()
            check_strict(STOCK, reason, scope.settings.only)
            if scope.recorders:
                counted: tuple[Tensor, Any] = recording(run, scope.recorders, STOCK, None, reason=reason)(
                    query, key, value, None
                )
                return counted
        return run(query, key, value, None)

    return standing_in


#: Named arguments of `attention_forward` that it honours.
_HONOURED = frozenset({"dropout", "scaling", "is_causal", "position_bias", "softcap", "sliding_window"})


def _why_not(
    query: Any, key: Any, value: Any, attention_mask: Any, kwargs: dict[str, Any], harmless: Collection[str]
) -> str | None:
    """Why the host's own function runs the call; None where attn does."""
    if torch.compiler.is_exporting() or torch.jit._trace.is_tracing():  # type: ignore[no-untyped-call]
        return "the model is exported or traced: what is saved must not need attn"
    for operand in (query, key, value):
        if type(operand) not in PLAIN and not torch.compiler.is_compiling():
            return f"attn does not model operands that are {type(operand).__name__}"
    others = {name: given for name, given in kwargs.items() if name not in _HONOURED}
    return refusal(others, harmless, attention_mask) if others else None
