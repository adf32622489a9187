"""The few calls seen last, recognised without building a key.

A model makes the same call in every layer. Building and hashing a key for it costs more than everything else on the
path, so the last few choices of a scope are tried first: three operands are compared (class, dtype, device,
requires_grad, dispatch keys, sizes and strides) by one call into torch, the guard object that compiled graphs use for
their inputs. Whatever it does not recognise takes the way through the table, which decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bias import AttnBias, TensorBias
from .kernel import Bound

#: Calls kept per scope: enough for a model that alternates between self- and cross-attention, or two masks.
KEPT = 4

#: (check, kind of bias, key of the bias or its lengths, options, function)
Entry = tuple[Callable[..., bool], type[AttnBias] | None, Any, tuple[Any, ...], Bound]


def entry(
    query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, options: tuple[Any, ...], run: Bound
) -> Entry | None:
    """What recognises this call; None where torch has no such guard object, and the table alone is used."""
    tensors = [query, key, value]
    bias_key: Any = None if bias is None else bias.key
    if type(bias) is TensorBias:
        tensors.append(bias.tensor)
        bias_key = bias.lengths
    check = guard(tensors)
    return None if check is None else (check, None if bias is None else type(bias), bias_key, options, run)


def guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """A function of as many tensors that tells whether they look the same; None where torch has no such object."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (AttributeError, TypeError, SystemError, RuntimeError):  # not public: another torch may have another
        return None
    return guards.check
