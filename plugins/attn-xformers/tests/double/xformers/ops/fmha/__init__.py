"""The front end: checks what it is given, asks the operator, and calls it."""

import torch

from . import attn_bias, ck, ck_splitk, cutlass, cutlass_blackwell, flash, flash3, triton_splitk
from .common import Context, Inputs


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    if not any(x.requires_grad for x in (query, key, value)):  # of a bias, nothing is asked
        return memory_efficient_attention_forward(query, key, value, attn_bias, p, scale, op=op[0])
    return _WithBackward.apply(*op, query, key, value, attn_bias, p, scale)


def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return _checked(op, Inputs(query, key, value, attn_bias, p, scale), False)[0]


def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    if p:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    out, context = _checked(op, Inputs(query, key, value, attn_bias, p, scale), True)
    return out, context.lse


def _checked(op, inputs, needs_gradient):
    inputs.validate_inputs()
    reasons = op.not_supported_reasons(inputs)
    if reasons:
        raise ValueError(f"Operator does not support inputs: {reasons}")
    return op.apply(inputs, needs_gradient=needs_gradient)


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, query, key, value, attn_bias, p, scale):
        inputs = Inputs(query, key, value, attn_bias, p, scale)
        out, context = _checked(forward, inputs, True)
        ctx.save_for_backward(query, key, value, out, context.lse)
        ctx.rest = (context.op_bw or backward), attn_bias, p, scale, context.rng_state
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        backward, attn_bias, p, scale, rng_state = ctx.rest
        context = Context(lse=lse, out=out, rng_state=rng_state)
        grads = backward.apply(context, Inputs(query, key, value, attn_bias, p, scale), grad)
        return None, None, grads.dq, grads.dk, grads.dv, grads.db, None, None


__all__ = ["attn_bias", "ck", "ck_splitk", "cutlass", "cutlass_blackwell", "flash", "flash3", "triton_splitk"]
