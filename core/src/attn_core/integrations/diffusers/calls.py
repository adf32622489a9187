"""What diffusers calls in the place of a backend of its own, and of torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...bias import AttnBias, Causal, TensorBias, Window, as_bias
from ...by_methods import with_causal
from ...dispatch import PLAIN
from ...errors import InputError
from ...functional import attention, scaled_dot_product_attention
from ...record import STOCK, recording
from ...scope import current
from ...select import check_strict

#: What `record` says of calls that are left to diffusers.
PARALLEL = "context parallelism is diffusers' own: it splits the call inside its own backends"
SKIPPED = "diffusers skips the scores of this call, which it does inside torch's scaled_dot_product_attention"

#: Arguments that attn cannot honour, and what to do instead. False is as good as None.
UNSUPPORTED = {
    "deterministic": "attn follows torch.use_deterministic_algorithms(True); switch that on instead",
    "return_attn_probs": "the log-sum-exp is return_lse=True here; the weights are never held",
}

#: What a call may say beside its operands, and what says nothing.
_OPTIONS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "return_lse": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
}
_TOP_LEFT = Causal("top-left")
_modes = torch._C._len_torch_function_stack
_mode_at = torch._C._get_function_stack_at

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class State:
    """What diffusers' module of backends is, what was put there, and what was there before."""

    module: Any
    member: Any
    before: Any  #: the backend that was active


#: None where attn is not enabled.
state: State | None = None


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttnBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    _parallel_config: Any = None,
    **kwargs: Any,
) -> Any:
    """The attention function, as diffusers calls it.

    Args:
        query: `[batch, seqlen_q, num_heads, head_dim]`.
        key: `[batch, seqlen_kv, num_kv_heads, head_dim]`.
        value: `[batch, seqlen_kv, num_kv_heads, head_dim_v]`.
        attn_mask: boolean (True = may attend) or floating (added), of shape `[seqlen_q, seqlen_kv]`,
            `[batch, seqlen_q, seqlen_kv]` or `[batch, num_heads, seqlen_q, seqlen_kv]`, where sizes of 1 broadcast; or
            `[batch, seqlen_kv]`, which says what keys are padding. Two dimensions that can be read both ways are
            padding, as diffusers has it. A bias will do, too.
        dropout_p: probability of dropping a weight.
        is_causal: top-left causal.
        scale: of the logits; default `head_dim ** -0.5`.
        enable_gqa: lets several query heads read one key head.
        return_lse: also return the log-sum-exp.
        window_size: keys before and behind the diagonal, -1 for no limit; its corner is the bottom right, as
            flash-attn has it.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for no bound.
        _parallel_config: set by diffusers where it splits the sequence over devices: then the call is diffusers' own.

    Returns:
        `[batch, seqlen_q, num_heads, head_dim_v]`; with `return_lse`, `(out, lse)`, lse
        `[batch, num_heads, seqlen_q]` in float32, as diffusers' flash backends return it.

    Raises InputError, which is a ValueError, for `is_causal` beside a tensor as mask, and for any other argument that
    is not None, by its name; what `attention` raises besides.
    """
    if kwargs:
        _check(kwargs)
    skipped = _skips_scores()
    if _parallel_config is not None or skipped:
        asked = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, tuple(window_size), softcap)
        return _left_to_diffusers(query, key, value, asked, _parallel_config, SKIPPED if skipped else PARALLEL)
    bias: Any = attn_mask
    if attn_mask is not None and isinstance(attn_mask, Tensor):
        bias = _four_dimensional(attn_mask, query, key)
        if is_causal:
            raise InputError("is_causal: cannot be True where attn_mask is given; put the causal mask into attn_mask")
    elif is_causal:
        bias = _TOP_LEFT if attn_mask is None else with_causal(attn_mask, query)
    if window_size != (-1, -1):
        bias = _windowed(window_size, bias)
    if not _agree(query, key, value, enable_gqa):
        if return_lse or softcap:
            raise InputError("return_lse, softcap: not for operands that broadcast, or that are no plain tensors")
        query, key, value = query.permute(0, 2, 1, 3), key.permute(0, 2, 1, 3), value.permute(0, 2, 1, 3)
        bias = as_bias(bias)  # a tensor of its own is nothing to warn of
        out = scaled_dot_product_attention(query, key, value, bias, dropout_p, scale=scale, enable_gqa=enable_gqa)
        return out.permute(0, 2, 1, 3)
    return attention(  # type: ignore[call-overload]
        query, key, value, bias, scale=scale, softcap=softcap or None, dropout_p=dropout_p, return_lse=return_lse
    )


def _check(kwargs: dict[str, Any]) -> None:
    """Raises InputError for an argument that would otherwise vanish."""
    for name, value in kwargs.items():
        if name in UNSUPPORTED:
            if value is not None and value is not False:
                raise InputError(f"{name}: {UNSUPPORTED[name]}")
        elif value is not None:
            raise InputError(f"{name}: attn does not know this argument, so it might change what attention means")


def _four_dimensional(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as it broadcasts to `[batch, num_heads, seqlen_q, seqlen_kv]`.

    Raises InputError for three dimensions that are the batch's and could be the heads', or are neither's.
    """
    if mask.ndim == 2 and mask.shape[0] == query.shape[0] and mask.shape[1] == key.shape[1]:
        return mask.unsqueeze(1).unsqueeze(1)
    if mask.ndim != 3 or mask.shape[0] == 1:
        return mask
    batch, num_heads = query.shape[0], query.shape[2]
    if mask.shape[0] != batch or batch == num_heads:
        said = f"batch and num_heads are both {batch}" if batch == num_heads else f"batch is {batch}"
        raise InputError(
            f"attn_mask: three dimensions are [batch, seqlen_q, seqlen_kv], got {list(mask.shape)}, where {said};"
            " give it four, [batch or 1, num_heads or 1, seqlen_q, seqlen_kv]"
        )
    return mask[:, None]


def _windowed(window_size: tuple[int, int], bias: AttnBias | Tensor | None) -> AttnBias:
    """The window as flash-attn means it, and the bias."""
    left, right = (None if limit == -1 else limit for limit in window_size)
    window = Window(left, right, "bottom-right")
    given = as_bias(bias)
    return window if given is None else window + given


def _agree(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether `attention` takes these operands as scaled_dot_product_attention would."""
    if type(query) not in PLAIN or type(key) not in PLAIN or type(value) not in PLAIN:
        return False
    q, k, v = query.shape, key.shape, value.shape
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        return True  # it says what is wrong
    return q[0] == k[0] == v[0] and k[2] == v[2] and (enable_gqa or q[2] == k[2])


def _skips_scores() -> bool:
    """Whether diffusers is to take the values for the output here, by a mode that only torch's own function meets."""
    modes = _modes()
    return modes > 0 and any(type(_mode_at(i)).__name__ == "AttentionScoreSkipFunctionMode" for i in range(modes))


def _left_to_diffusers(
    query: Tensor, key: Tensor, value: Tensor, asked: tuple[Any, ...], parallel: Any, reason: str
) -> Any:
    """The call by the backend that was active before; `record` has the reason.

    Raises InputError for what that backend has no argument for, KernelRefusedError in a strict scope.
    """
    if state is None:
        raise InputError(f"diffusers: {reason}; enable() says which backend that is")
    registry, before = state.module._AttentionBackendRegistry, state.before
    names = registry._supported_arg_names[before]
    options = dict(zip(_OPTIONS, asked))
    lost = [name for name, it in options.items() if name not in names and it is not None and it != _OPTIONS[name]]
    if isinstance(options["attn_mask"], AttnBias):
        lost.append("attn_mask that is a bias")
    if lost or (parallel is not None and before.value not in registry._supports_context_parallel):
        why = f"takes no {', '.join(lost)}" if lost else "does not split calls"
        raise InputError(
            f"diffusers: {reason}; but {before.value!r}, which was active before attn, {why}: choose another backend"
            " by set_attention_backend"
        )
    stock = registry._backends[before]
    options = {name: it for name, it in options.items() if name in names}

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return stock(query=query, key=key, value=value, **options, _parallel_config=parallel)

    return _stock(run, query, key, value, None, reason)


def _stock(run: Forward, query: Tensor, key: Tensor, value: Tensor, bias: Any, reason: str) -> Any:
    """Runs what goes past every kernel. Raises KernelRefusedError in a strict scope."""
    if torch.compiler.is_compiling():
        return run(query, key, value, bias)
    scope = current.get()
    check_strict(STOCK, reason, scope.settings.only)
    if scope.recorders:
        run = recording(run, scope.recorders, STOCK, None, reason=reason)
    return run(query, key, value, bias)


def own_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttnBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention, with its signature, by attn: what models call that choose no backend."""
    if _skips_scores():

        def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return _stock(run, query, key, value, attn_mask, SKIPPED)  # type: ignore[no-any-return]
    bias = TensorBias(attn_mask) if isinstance(attn_mask, Tensor) and not is_causal else attn_mask
    return scaled_dot_product_attention(
        query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
