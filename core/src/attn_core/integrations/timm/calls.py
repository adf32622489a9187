"""What timm calls in the place of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from ...bias import Causal
from ...by_methods import with_causal
from ...calling_module import in_its_module
from ...dispatch import SDPA, SDPA_GQA, call
from ...errors import IntegrationWarning
from ...explain import explain
from ...scope import Scope, Settings, current, prefer
from ...select import matches
from ...trace import traced
from ..torch.redirection import say_not_exported, say_stock, stays_stock

_TOP_LEFT = Causal("top-left")
_is_tracing = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting
_frame = sys._getframe


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `enable` was told."""

    prefer: tuple[str, ...] = ()
    strict: bool = False


class Preference:
    """A `prefer` scope around calls of one host, whose way in is found once: the scope in it, for the one around it."""

    def __init__(self, options: Options) -> None:
        self._prefer = prefer(*options.prefer, strict=options.strict)
        self._latest: tuple[Scope | None, Settings | None, Scope | None] = (None, None, None)

    def scope(self) -> Scope:
        """The scope to run in, where the task is in `current`."""
        outer = current.get()
        around, settings, inner = self._latest
        if inner is None or around is not outer or settings is not outer.settings:
            with self._prefer:
                inner = current.get()
            self._latest = outer, outer.settings, inner
        return inner


#: Read by every call; `use` sets all three.
options = Options()
_preference: Preference | None = None
#: Kinds of calls, by the place that they come from, of which it is known whether a preferred kernel takes them.
_looked_at: set[Any] = set()


def use(new: Options) -> None:
    """Has calls follow these options from now on. Raises what `prefer` raises for its patterns."""
    global options, _preference
    _preference = Preference(new) if new.prefer or new.strict else None
    options = new
    _looked_at.clear()


def from_timm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention, with its signature, by attn, with what `enable` was told to prefer."""
    if is_recorded(query):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = _bias_of(attn_mask, is_causal, query)
    door = SDPA_GQA if enable_gqa else SDPA
    if _is_tracing():
        if not options.prefer:
            return traced(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]
        with prefer(*options.prefer, strict=options.strict):
            return traced(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]
    preference = _preference
    if preference is None:
        return call(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]
    token = current.set(preference.scope())
    try:
        _look_at(_frame(1).f_code, door, query, key, value, bias, scale, dropout_p)
        return call(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]
    finally:
        current.reset(token)


def always(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same for modules that were made for attn: without what `enable` was told."""
    if is_recorded(query):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = _bias_of(attn_mask, is_causal, query)
    door = SDPA_GQA if enable_gqa else SDPA
    run = traced if _is_tracing() else call
    return run(door, query, key, value, bias, scale, None, dropout_p, False, None)  # type: ignore[no-any-return]


def is_recorded(*operands: object) -> bool:
    """Whether what runs is recorded for a program that will run without attn; says so, once per process."""
    if _is_tracing():
        if _is_exporting():
            say_not_exported()
        return _is_exporting()
    recorder = stays_stock(*operands)
    if recorder is not None:
        say_stock(recorder)
    return recorder is not None


def _bias_of(attn_mask: Any, is_causal: bool, query: Tensor) -> Any:
    if not is_causal:
        return attn_mask
    return _TOP_LEFT if attn_mask is None else with_causal(attn_mask, query)


def _look_at(
    place: CodeType,
    door: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    scale: float | None,
    dropout_p: float,
) -> None:
    """Warns, once per place and kind of call, where no preferred kernel takes it; names the module and the reasons."""
    kind = (
        id(place),
        bias is None,
        torch.is_grad_enabled() and (query.requires_grad, getattr(bias, "requires_grad", False)),
        query.dtype,
        query.device.type,
    )
    if kind in _looked_at:
        return
    _looked_at.add(kind)
    found = explain(
        query,
        key,
        value,
        bias,
        scale=scale,
        dropout_p=dropout_p,
        layout="heads-first",
        enable_gqa=door == SDPA_GQA,
    )
    if found.chosen is None or matches(found.chosen, options.prefer):
        return
    lines = [
        f"    {verdict.kernel} is {verdict.state}: {'; '.join(verdict.reasons)}"
        for verdict in found
        if matches(verdict.kernel, options.prefer)
    ]
    told = in_its_module(f"{found.chosen} runs, for no preferred kernel takes this call")
    warnings.warn("\n".join([told, *lines]), IntegrationWarning, stacklevel=4)
