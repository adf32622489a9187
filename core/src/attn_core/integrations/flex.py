"""Biases for those who call `torch.nn.attention.flex_attention` themselves.

    from torch.nn.attention.flex_attention import flex_attention
    from attn_core.integrations.flex import flex_block_mask, flex_score_mod

    bias = (Causal() + ALiBi(num_heads)).bind(seqlen, seqlen)
    flex_attention(query, key, value, score_mod=flex_score_mod(bias), block_mask=flex_block_mask(bias, query.device))

is `attention(..., bias)`, heads first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, as_bias
from ..errors import InputError
from ..torch_kernels.flex_forms import block_mask_of, score_mod_of


def flex_block_mask(bias: AttnBias | Tensor | None, device: torch.device | str = "cpu") -> Any:
    """FlexAttention's `BlockMask` of the masks in `bias`, in blocks of 128, or its own for a `BlockMask` of multiples
    of that; None where nothing of it is a mask.

    `bias` is bound. No dense form is made, outside of a traced graph: only blocks at a mask's borders are evaluated.
    What a boolean tensor masks is in `flex_score_mod`. FlexAttention masks padding, but reads it: it must be finite.
    Raises UnboundBiasError before `bind`, InputTypeError for what is no bias.
    """
    mask = None if (given := _bound(bias)) is None else given.mask
    return None if mask is None else block_mask_of(mask, torch.device(device))


def flex_score_mod(bias: AttnBias | Tensor | None) -> Callable[..., Tensor] | None:
    """A `score_mod(score, b, h, q_idx, kv_idx)` of what in `bias` is no mask; None where that is nothing.

    `bias` is bound, its tensors on the operands' device; boolean tensors among its parts mask by -inf. The result is
    float32. Raises as `flex_block_mask` does.
    """
    given = _bound(bias)
    return None if given is None else score_mod_of(given.scores)


def _bound(bias: AttnBias | Tensor | None) -> AttnBias | None:
    """Normalized."""
    given = as_bias(bias)
    if given is None:
        return None
    if isinstance(bias, Tensor):
        raise InputError(
            "bias: a bare tensor does not say its lengths; TensorBias(tensor).bind(seqlen_q, seqlen_kv) does"
        )
    given.bound_lengths()
    return given.normalize()
