"""@register_sdpa: a function with torch's SDPA signature becomes a kernel, ranked and explained like any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .bias import AttnBias, Causal, TensorBias
from .capabilities import ANY_DIM, Backward, BiasKind, Capabilities
from .cost import Cost
from .errors import DeclarationError
from .kernel import Kernel
from .registry import Registration, registry

SdpaFunction = Callable[..., Tensor]


def register_sdpa(
    name: str,
    *,
    devices: Collection[str],
    dtypes: Collection[torch.dtype],
    head_dims: Collection[int] = ANY_DIM,
    biases: Collection[BiasKind] = (),
    backward: Backward | bool | None = None,
    costs: dict[str, Cost] | None = None,
    **capabilities: Any,
) -> Callable[[SdpaFunction], Registration]:
    """Registers a function `(query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)` as a kernel.

        @register_sdpa("mine/fast", devices={"cpu"}, dtypes={torch.float32}, biases={TensorBias})
        def fast(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
            ...

    Operands are heads-first. Of `biases` it may name TensorBias (it gets `attn_mask`) and Causal("top-left") (it gets
    `is_causal=True`). Everything else is as in `Capabilities`; what is not named is not supported.

    Returns the handle, in place of the function: `unregister()`, or `with` for a block.

    Raises DeclarationError for another bias, a capability unknown to SDPA's signature, or a function that lacks a
    parameter which the declaration needs; DuplicateKernelError for a name that is taken.
    """
    for option in sorted(set(capabilities) - {field.name for field in fields(Capabilities)}):
        raise DeclarationError(f"{name}: Capabilities has no {option!r}")
    for option in ("softcap", "return_lse"):
        if capabilities.get(option):
            raise DeclarationError(f"{name}: SDPA's signature has no {option}; register a Kernel instead")
    for bias in biases:
        if bias is not TensorBias and bias != Causal("top-left"):
            raise DeclarationError(
                f'{name}: SDPA\'s signature has words for TensorBias and Causal("top-left"), got {bias!r}'
            )
    declared = Capabilities(
        devices=devices, dtypes=dtypes, head_dims=head_dims, biases=biases, backward=backward, **capabilities
    )

    def decorate(function: SdpaFunction) -> Registration:
        _check_parameters(name, function, declared)

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *,
            bias: AttnBias | None = None,
            scale: float,
            dropout_p: float = 0.0,
        ) -> Tensor:
            options: dict[str, Any] = {}
            if isinstance(bias, TensorBias):
                options["attn_mask"] = bias.tensor
            elif bias is not None:
                options["is_causal"] = True
            if dropout_p:
                options["dropout_p"] = dropout_p
            if query.shape[1] != key.shape[1]:
                options["enable_gqa"] = True
            return function(query, key, value, scale=scale, **options)

        kernel = Kernel(name=name, run=run, capabilities=declared, layout="heads-first", costs=costs or {})
        return registry.register(kernel)

    return decorate


def _check_parameters(name: str, function: SdpaFunction, declared: Capabilities) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # torch's own, among others
        raise DeclarationError(f"{name}: a built-in has no signature to check; wrap it in a Python function") from error
    kinds = {p.kind for p in parameters.values()}
    if kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        raise DeclarationError(f"{name}: the function has a catch-all parameter; name what it takes")
    needed = {
        "scale": True,
        "attn_mask": TensorBias in declared.biases,
        "is_causal": any(bias is not TensorBias for bias in declared.biases),
        "dropout_p": declared.dropout,
        "enable_gqa": declared.gqa,
    }
    missing = [option for option, used in needed.items() if used and option not in parameters]
    if missing:
        raise DeclarationError(f"{name}: its declaration needs the parameter {', '.join(missing)}, which it lacks")
    required = [p.name for p in list(parameters.values())[3:] if p.default is p.empty and p.name != "scale"]
    if len(parameters) < 4 or required:
        lacking = f"; without a default: {', '.join(required)}" if required else ""
        raise DeclarationError(f"{name}: options after query, key and value must have defaults{lacking}")
