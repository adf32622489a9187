"""cuda-ref/simple on any launcher, around registry and dispatch: for runs of other builds, schedules and texts."""

from __future__ import annotations

from typing import Any

import torch
from attn_core.testing.differences import Call
from attn_core.testing.problems import Inputs
from attn_cuda_ref.gradients import bias_sizes, gradients_of_tensors
from attn_cuda_ref.launcher import Launcher
from attn_cuda_ref.simple_launches import SimpleLaunches
from attn_cuda_ref.translate import Bias, translated
from torch import Tensor


def directly(launcher: Launcher) -> Call:
    """What `differences` calls: out, or (out, lse), with a derivative that launches the backward."""
    launches = SimpleLaunches(lambda device: launcher)

    def call(inputs: Inputs) -> Any:
        bias = None if inputs.bias is None else inputs.bias.bind(inputs.query.shape[1], inputs.key.shape[1])
        given = translated(bias, inputs.query.device)
        scale, softcap = inputs.options["scale"], inputs.options.get("softcap")
        operands = inputs.query, inputs.key, inputs.value
        out, lse = _Attention.apply(launches, given, scale, softcap, *operands, *given.tensors)
        return (out, lse) if inputs.options.get("return_lse") else out

    return call


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launches: SimpleLaunches, bias: Bias, scale: float, softcap: float | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value, *_ = tensors
        out, lse = launches.forward(query, key, value, bias, scale, softcap)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.launches, ctx.bias, ctx.options = launches, bias, (scale, softcap)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        of_query, of_key, of_value, *trained = ctx.needs_input_grad[4:]
        sizes = bias_sizes(ctx.bias, trained)
        needs = [of_query, of_key or of_value, any(trained)]
        *operands, logits = ctx.launches.backward(
            grad_out, grad_lse, query, key, value, out, lse, ctx.bias, *ctx.options, needs, sizes
        )
        found = [x if needed else None for x, needed in zip(operands, (of_query, of_key, of_value))]
        return (*(None,) * 4, *found, *gradients_of_tensors(ctx.bias, trained, logits))
