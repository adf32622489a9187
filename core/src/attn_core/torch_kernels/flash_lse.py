"""The CPU's flash op with an LSE that has a gradient.

The op gives the LSE, but no gradient to it. Its backward computes, for each query,

    delta = sum(grad_out * out),    grad_logits = weights * (grad_out · value - delta)

and a gradient to the LSE would be one more term, weights * grad_lse: the same as delta - grad_lse in place of delta.
The op takes `out` as an argument, so one more column says it: grad_out gets a column of 1, out one of -grad_lse, and
query, key and value one of 0, which changes nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dense import MASKED, empty_rows

_forward = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashWithLse(torch.autograd.Function):
    """`(query, key, value, mask, causal, scale) -> (out, lse)`, heads-first, differentiable in query, key and value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse if mask is None else lse.masked_fill(empty_rows(mask), MASKED)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, mask, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        one, none = (0, 1), (None, None, None)
        if mask is not None:  # a row without keys has a constant LSE, which the op calls 0
            empty = lse == MASKED
            grad_lse, lse = grad_lse.masked_fill(empty, 0.0), lse.masked_fill(empty, 0.0)
        grads = _backward(
            pad(grad_out, one, value=1.0),
            pad(query, one),
            pad(key, one),
            pad(value, one),
            torch.cat([out, -grad_lse.unsqueeze(-1).to(out.dtype)], -1),
            lse,
            0.0,
            ctx.causal,
            attn_mask=mask,
            scale=ctx.scale,
        )
        return *(grad[..., :-1] for grad in grads), *none
