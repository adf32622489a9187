"""The kernels as ops of torch.library, so that a graph can hold them: schemas, fakes, and the derivative.

`Library.define` and `impl`, not `custom_op`: that costs some eight microseconds more at every call. A bias is handed
over as plain strings, numbers and tensors, since a graph holds nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import bias_sizes, gradients_of_tensors
from .launcher import Launcher
from .simple_launches import SimpleLaunches, empty_gradients, empty_results
from .translate import Bias

NAMESPACE = "attn_cuda_ref"
_BIAS = "str mask, str mask_fields, str[] scores, str[] score_fields, Tensor[] tensors, SymInt[] numbers"
_OPTIONS = "float scale, float? softcap"

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"simple_forward(Tensor query, Tensor key, Tensor value, {_BIAS}, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "simple_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    f" {_BIAS}, {_OPTIONS}, bool[] needs, SymInt[] bias_sizes) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "simple_table_gradient(Tensor grad_logits, str table, SymInt[] sizes) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def implement(dispatch_key: str, launcher_of: Callable[[torch.device], Launcher]) -> None:
    """Runs the ops of tensors of a dispatch key, such as "CUDA", by these launchers."""
    launches = SimpleLaunches(launcher_of)

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *bias, scale, softcap = rest
        return launches.forward(query, key, value, Bias(*bias), scale, softcap)

    def backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_out, grad_lse, query, key, value, out, lse, *rest = given
        *bias, scale, softcap, needs, sizes = rest
        operands = query, key, value, out, lse
        return launches.backward(grad_out, grad_lse, *operands, Bias(*bias), scale, softcap, needs, sizes)

    _library.impl("simple_forward", forward, dispatch_key)
    _library.impl("simple_backward", backward, dispatch_key)
    _library.impl("simple_table_gradient", launches.table_gradient, dispatch_key)


def _gpu(device: torch.device) -> Launcher:
    from .gpu import launcher  # loads libraries of CUDA

    return launcher(device.index)


implement("CUDA", _gpu)


# Without data


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_results(query, value)


def _fake_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, query, key, value, *_, needs, sizes = given
    return empty_gradients(query, key, value, needs, sizes)


def _fake_table_gradient(grad_logits: Tensor, table: str, sizes: Sequence[int]) -> Tensor:
    return grad_logits.new_empty(sizes)


torch.library.register_fake(f"{NAMESPACE}::simple_forward", _fake_forward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::simple_backward", _fake_backward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::simple_table_gradient", _fake_table_gradient, lib=_library)


# The derivative


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, mask_fields, scores, score_fields, tensors, numbers, scale, softcap = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, *tensors)
    ctx.of_bias = mask, mask_fields, scores, score_fields, numbers
    ctx.options = scale, softcap
    ctx.set_materialize_grads(False)


def _nothing(values: list[Any]) -> list[Any] | None:
    """The gradient of a list without tensors; torch takes an empty list for one of tensors."""
    return None if values else []


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    mask, mask_fields, scores, score_fields, numbers = ctx.of_bias
    bias = Bias(mask, mask_fields, scores, score_fields, tensors, numbers)
    of_query, of_key, of_value = ctx.needs_input_grad[:3]
    trained = ctx.needs_input_grad[7]  # one for each of `tensors`
    sizes = bias_sizes(bias, trained)
    needs = [of_query, of_key or of_value, any(trained)]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = torch.ops.attn_cuda_ref.simple_backward(
        grad_out, grad_lse, query, key, value, out, lse, *bias, *ctx.options, needs, sizes
    )
    grad_query, grad_key, grad_value, grad_logits = found
    return (
        grad_query if of_query else None,
        grad_key if of_key else None,
        grad_value if of_value else None,
        *(None, None),
        *(_nothing(scores), _nothing(score_fields)),
        gradients_of_tensors(bias, trained, grad_logits),
        _nothing(numbers),
        *(None, None),
    )


torch.library.register_autograd(f"{NAMESPACE}::simple_forward", _backward, setup_context=_setup_context, lib=_library)
