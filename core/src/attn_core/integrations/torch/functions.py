"""What stands in for torch's functions while attention is redirected.

Each passes a call that is not redirected on, untouched, to what it replaced. Under torch.jit.script they are what they
replaced, too: it compiles source, and ours cannot be.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ...bias import AttnBias, Causal
from ...by_methods import with_causal
from ...dispatch import PLAIN, SDPA, SDPA_GQA, call
from ...record import STOCK
from ...scope import current
from ...trace import traced
from ...tracing import constant
from .redirection import (
    Asked,
    Options,
    inside_traced_kernel,
    say_not_exported,
    say_stock,
    stays_stock,
    traced_scope,
)

Function = Callable[..., Any]

STOCK_SDPA = torch._C._nn.scaled_dot_product_attention
NEED_WEIGHTS = "nn.MultiheadAttention with need_weights=True computes the weights itself"

_is_tracing = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting
_TOP_LEFT = Causal("top-left")


def redirecting_sdpa(
    original: Function, options_of: Callable[[], Options | None], asked_of: Callable[[], Asked | None]
) -> Function:
    """F.scaled_dot_product_attention, redirected where `options_of` (for eager calls) and `asked_of` (for traced ones)
    say so, else `original`."""

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        if _is_tracing():
            asked = asked_of()
            if asked is None or inside_traced_kernel():
                return _stock(original, args, kwargs)
            if _is_exporting():
                say_not_exported()
                return _stock(original, args, kwargs)
            return _traced(asked, *args, **kwargs)
        options = options_of()
        if options is None:
            return _stock(original, args, kwargs)
        recorder = stays_stock(*args[:3])
        if recorder is not None:
            say_stock(recorder)
            return _stock(original, args, kwargs)
        prefer = options.prefer
        if prefer is None:
            return _eager(*args, **kwargs)
        # Less than entering it, which every call would pay for: nobody but this call can leave it. Graphs are not told:
        # what is compiled within a kernel is not redirected.
        outer = current.set(prefer.scope_within(current.get()))
        try:
            return _eager(*args, **kwargs)
        finally:
            current.reset(outer)

    scaled_dot_product_attention.__doc__ = original.__doc__
    scaled_dot_product_attention.__prepare_scriptable__ = lambda: _scriptable(options_of)  # type: ignore[attr-defined]
    return scaled_dot_product_attention


def _stock(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`original`, as if nothing had replaced it.

    torch's own CausalBias is the one that would notice: it asks whether it was passed to the function that stands in
    torch.nn.functional.
    """
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if mask is not None and type(mask) not in PLAIN:
        bias = sys.modules.get("torch.nn.attention.bias")
        if bias is not None and isinstance(mask, bias.CausalBias):
            return bias.CausalBias._dispatch(*args, **kwargs)
    return original(*args, **kwargs)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: AttnBias | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """attn_core.scaled_dot_product_attention, but for what that says of plain tensors: this code is not their place."""
    bias: Any = attn_mask
    if is_causal:
        bias = _TOP_LEFT if attn_mask is None else with_causal(attn_mask, query)
    return call(SDPA_GQA if enable_gqa else SDPA, query, key, value, bias, scale, None, dropout_p, False, None)


def _traced(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: AttnBias | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The same in a traced graph."""
    bias: Any = attn_mask
    if is_causal:
        bias = _TOP_LEFT if attn_mask is None else with_causal(attn_mask, query)
    door = SDPA_GQA if enable_gqa else SDPA
    if not asked[0] and not asked[1]:
        return traced(door, query, key, value, bias, scale, None, dropout_p, False, None)
    with traced_scope(asked):
        return traced(door, query, key, value, bias, scale, None, dropout_p, False, None)


# What an error of a call with wrong arguments names.
_eager.__qualname__ = _traced.__qualname__ = "scaled_dot_product_attention"


def _scriptable(options_of: Callable[[], Options | None]) -> Function:
    """What torch.jit.script compiles in its place."""
    if options_of() is not None:
        say_stock("torch.jit.script")
    return _as_scripted


def _as_scripted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,  # noqa: UP045  (torch.jit.script reads it)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,  # noqa: UP045
    enable_gqa: bool = False,
) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def redirecting_mha(
    original: Function,
    inlined: Function,
    options_of: Callable[[], Options | None],
    asked_of: Callable[[], Asked | None],
) -> Function:
    """F.multi_head_attention_forward. With `need_weights=True` it never calls SDPA: `record` is told so.

    torch.compile puts it into a graph as it is, unseen, so that what it calls would be looked up when the graph runs.
    `inlined` is a copy that is traced through.
    """

    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        need_weights = args[15] if len(args) > 15 else kwargs.get("need_weights", True)
        if _is_tracing():
            if asked_of() is None or _is_exporting():
                return original(*args, **kwargs)
            if need_weights:
                _note_weights()
                return original(*args, **kwargs)
            return inlined(*args, **kwargs)
        if options_of() is None:
            return original(*args, **kwargs)
        recorders = current.get().recorders
        if not need_weights or not recorders:
            return inlined(*args, **kwargs)
        start = time.perf_counter()
        result = original(*args, **kwargs)
        seconds = time.perf_counter() - start
        for recorder in recorders:
            recorder.count(recorder.row(STOCK, None, reason=NEED_WEIGHTS), seconds)
        return result

    multi_head_attention_forward.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return multi_head_attention_forward


@constant
def _note_weights() -> None:
    for recorder in current.get().recorders:
        recorder.note_traced(STOCK, (), NEED_WEIGHTS)


def redirecting_fastpath(
    original: Function, options_of: Callable[[], Options | None], asked_of: Callable[[], Asked | None]
) -> Function:
    """torch.backends.mha.get_fastpath_enabled: off where calls are redirected, since it goes past SDPA."""

    def get_fastpath_enabled() -> bool:
        redirected = asked_of() if _is_tracing() else options_of()
        if redirected is None or _is_exporting() or (not _is_tracing() and stays_stock() is not None):
            return original()  # type: ignore[no-any-return]
        return False

    get_fastpath_enabled.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return get_fastpath_enabled
