"""The attention function, as transformers calls it: what attn cannot honour is an error that names the argument."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...bias import AttnBias, Causal, TensorBias
from ...errors import InputError
from ...functional import attention
from .eager_only import is_for_eager_alone
from .masks import LazyMask

#: Bookkeeping of the host, without any bearing on the result of attention.
HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)

#: Arguments that attn cannot honour, and what to do instead. False is as good as None.
UNSUPPORTED = {
    "output_attentions": 'attn never holds the attention weights; for them, use attn_implementation="eager"',
    "s_aux": 'attn has no attention sinks; use attn_implementation="eager" for this model',
    "sinks": 'attn has no attention sinks; use attn_implementation="eager" for this model',
    "indices": 'this model makes a mask of its chosen keys for "eager" and "sdpa" only; use one of these',
    "block_indices": 'this model makes a mask of its chosen blocks for "eager" and "sdpa" only; use one of these',
    "cache": 'attn does not read a paged cache; for continuous batching, use attn_implementation="sdpa"',
    "deterministic": "attn follows torch.use_deterministic_algorithms(True); switch that on instead",
}

#: Arguments that say where packed sequences begin: honoured where a mask keeps these apart, else an error.
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})

#: The longest of the packed sequences: says nothing that cu_seq_lens does not.
LONGEST = frozenset({"max_length_q", "max_length_k"})


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | AttnBias | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    *,
    harmless: Collection[str] = HARMLESS,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, as transformers calls it.

    Args:
        module: the attention layer; its `is_causal` (True where it has none) counts where the argument is None, but
            in a model that is made for "eager" alone, which asks the mask alone.
        query: `[batch, num_heads, seqlen_q, head_dim]`.
        key: `[batch, num_kv_heads, seqlen_kv, head_dim]`, heads not repeated.
        value: `[batch, num_kv_heads, seqlen_kv, head_dim_v]`.
        attention_mask: broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`, boolean (True = may attend) or
            floating (added); it says everything, so that `is_causal` then counts no more. A bias will do, too.
        dropout: probability of dropping a weight.
        scaling: of the logits; default `head_dim ** -0.5`.
        is_causal: top-left causal, where there is no mask and more than one query.
        position_bias: floating, added to the logits.
        softcap: bounds the scaled logits to (-softcap, softcap).
        sliding_window: keys that a query sees; the mask must say so, this only checks that there is one.
        harmless: names in `kwargs` that have no bearing on attention.

    Returns:
        `(out, None)`: out `[batch, seqlen_q, num_heads, head_dim_v]`, contiguous; never the weights.

    Raises InputError for any other argument that is not None, by its name; what `attention` raises besides.
    """
    if kwargs and (reason := refusal(kwargs, harmless, attention_mask)):
        raise InputError(reason)
    if type(attention_mask) is LazyMask:
        attention_mask = _understood(attention_mask, query, key, position_bias)
        is_causal = False  # the mask says everything, also where it masks nothing
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = seqlen_q > 1 and attention_mask is None and is_causal and not _asks_the_mask_alone(module)
    if causal and seqlen_kv > seqlen_q:
        # The first call with a cache of fixed size: what lies behind is not written yet. Causal from the top left, no
        # query sees it.
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
        if position_bias is not None:
            position_bias = position_bias[..., :seqlen_q]
    if sliding_window is not None and attention_mask is None and key.shape[2] > sliding_window:
        raise InputError(
            f"sliding_window: {sliding_window} keys of {key.shape[2]}, but there is no mask that says which;"
            f" pass attention_mask (a model makes it by itself where enable() has registered the mask function)"
        )
    bias: Any = Causal("top-left") if causal else attention_mask
    if position_bias is not None:
        bias = _with_position_bias(position_bias, bias, query, key)
    if query.shape[0] != key.shape[0]:
        query, key, value = _same_batch(query, key, value)
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias,
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
    )
    return out.contiguous(), None


def _asks_the_mask_alone(module: torch.nn.Module) -> bool:
    """Whether the layer is of a model that is made for "eager" alone, where `is_causal` has no say."""
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    return name is not None and name != "sdpa" and is_for_eager_alone(config)


def refusal(kwargs: dict[str, Any], harmless: Collection[str], attention_mask: object) -> str | None:
    """Why an argument cannot be honoured, and what to do instead, by its name; None where none would vanish."""
    for name, value in kwargs.items():
        if value is None or name in harmless or name in LONGEST:
            continue
        if name in UNSUPPORTED:
            if value is not False:
                return f"{name}: {UNSUPPORTED[name]}"
        elif name in PACKED:
            one_sequence = name != "seq_idx" and value.shape[0] <= 2
            if attention_mask is None and not one_sequence:
                return (
                    f"{name}: speaks of packed sequences, but there is no mask that keeps them apart; pass"
                    " position_ids that start again at each of them, and use_cache=False, so that transformers makes"
                    " one"
                )
        else:
            return (
                f"{name}: attn does not know this argument, so it might change what attention means;"
                f' if it does not, say so: enable(ignore={{"{name}"}})'
            )
    return None


def _understood(mask: LazyMask, query: Tensor, key: Tensor, position_bias: Tensor | None) -> AttnBias | Tensor | None:
    """What the mask means, where it was made for these operands and is all there is; else the dense tensor."""
    batch, _, seqlen_q, seqlen_kv = mask.shape
    fits = (batch, seqlen_q, seqlen_kv) == (query.shape[0], query.shape[2], key.shape[2])
    return mask.bias() if fits and position_bias is None else mask.dense()


def _with_position_bias(position_bias: Tensor, bias: Any, query: Tensor, key: Tensor) -> TensorBias:
    """`position_bias` and the mask as one floating bias: -inf where the mask does not let attend."""
    if isinstance(bias, AttnBias):
        bias = bias.bind(query.shape[2], key.shape[2]).materialize(query.device)
    if bias is None:
        return TensorBias(position_bias)
    if bias.dtype is torch.bool:
        return TensorBias(torch.where(bias, position_bias, float("-inf")))
    return TensorBias(position_bias + bias)


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of one batch entry (learned queries) expanded to the others' batch, as SDPA broadcasts."""
    batch = max(query.shape[0], key.shape[0])
    return tuple(x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (query, key, value))  # type: ignore[return-value]
