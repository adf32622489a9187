"""transformers: models run their attention by attn, with `attn_implementation="attn"`.

    from attn_core.integrations import transformers as attn_transformers

    attn_transformers.enable()
    model = AutoModel.from_pretrained(…, attn_implementation="attn")    # or model.set_attn_implementation("attn")

Forced by the host:
- It asks one registry for the attention function and another for the mask function, both by the same name. For a name
  that the second does not know it hands over no mask at all, so padding would silently be attended. Hence `enable`
  registers both, the mask function being the host's own for its "sdpa".
- It passes whatever the caller of a model gave it on to the attention function. An argument that is not known here to
  be harmless is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal, TensorBias
from ..errors import InputError
from ..functional import attention
from .missing import MissingPackageError, need

NAME = "attn"
FIX = 'pip install "transformers>=5.23,<6"'

#: Bookkeeping of the host, without any bearing on the result of attention.
HARMLESS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
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

Forward = Callable[..., tuple[Tensor, None]]

#: What `enable` registered: name -> function.
_enabled: dict[str, Forward] = {}


def enable(name: str = NAME, *, ignore: Collection[str] = ()) -> None:
    """Makes `attn_implementation=name` run a model's attention by attn. A second time changes nothing but `ignore`.

    Args:
        name: under which the attention function and the mask function are registered.
        ignore: further keyword arguments, which a model hands to its attention, that have no bearing on it.

    Raises MissingPackageError without transformers, InputError for a name that is registered by someone else.
    """
    attentions, masks = _registries()
    ours = _enabled.get(name)
    if name == "eager" or attentions.get(name) is not ours or (ours is None and name in masks):
        raise InputError(f"enable: transformers has an attention {name!r} already; choose another name")
    harmless = HARMLESS | frozenset(ignore)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return attention_forward(*args, harmless=harmless, **kwargs)

    _enabled[name] = forward
    attentions.register(name, forward)
    masks.register(name, masks["sdpa"])


def disable(name: str = NAME) -> None:
    """Takes out what `enable` registered; nothing happens where it registered nothing.

    A model that is still set to `name` raises at its next call; set another with `set_attn_implementation`.
    """
    ours = _enabled.pop(name, None)
    if ours is None:
        return
    attentions, masks = _registries()
    if attentions.get(name) is ours:  # the host has no public way to take one out
        del attentions._global_mapping[name]
        del masks._global_mapping[name]


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
        module: the attention layer; its `is_causal` (True where it has none) counts where the argument is None.
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
    if kwargs:
        _check(kwargs, harmless, attention_mask)
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = seqlen_q > 1 and attention_mask is None and is_causal
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


def _check(kwargs: dict[str, Any], harmless: Collection[str], attention_mask: object) -> None:
    """Raises InputError for an argument that would otherwise vanish."""
    for name, value in kwargs.items():
        if value is None or name in harmless or name in LONGEST:
            continue
        if name in UNSUPPORTED:
            if value is not False:
                raise InputError(f"{name}: {UNSUPPORTED[name]}")
        elif name in PACKED:
            one_sequence = name != "seq_idx" and value.shape[0] <= 2
            if attention_mask is None and not one_sequence:
                raise InputError(
                    f"{name}: speaks of packed sequences, but there is no mask that keeps them apart; pass"
                    " position_ids that start again at each of them, and use_cache=False, so that transformers makes"
                    " one"
                )
        else:
            raise InputError(
                f"{name}: attn does not know this argument, so it might change what attention means;"
                f' if it does not, say so: enable(ignore={{"{name}"}})'
            )


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


def _registries() -> tuple[Any, Any]:
    """transformers' registries of attention functions and of mask functions."""
    purpose = "attn_core.integrations.transformers"
    need("transformers", purpose, FIX)
    modeling = need("transformers.modeling_utils", purpose, FIX)
    masking = need("transformers.masking_utils", purpose, FIX)
    try:
        return modeling.ALL_ATTENTION_FUNCTIONS, masking.ALL_MASK_ATTENTION_FUNCTIONS
    except AttributeError as error:
        raise MissingPackageError(
            f"{purpose} needs a transformers with a registry of mask functions: {error}.\nTo install it: {FIX}"
        ) from error
