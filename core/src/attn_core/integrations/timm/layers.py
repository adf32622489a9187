"""Classes of attention layers that compute by attn, to build a model of; nothing of timm is changed.

timm.create_model("vit_base_patch16_224", attn_layer=attn_timm.Attention)
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import InputTypeError
from ..torch import reach
from . import calls, fused
from .host import host
from .sites import FUSED, RENAMED, SDPA, bare, mentions, renamed, sites

Module = TypeVar("Module", bound=nn.Module)

#: Of this module's package: name -> where timm has the class.
CLASSES = {
    "Attention": "timm.layers",
    "AttentionRope": "timm.layers",
    "DiffAttention": "timm.layers",
    "EvaAttention": "timm.models.eva",
}

#: Names in the methods of these classes; whether timm's own are changed at the time does not matter.
OWN = {SDPA: "_attn_timm_layer_sdpa", FUSED: "_attn_timm_layer_fused"}
OWN |= {RENAMED[name]: OWN[name] for name in RENAMED}
reach.OURS.add(OWN[SDPA])


@functools.cache
def attn_layer(cls: type[Module]) -> type[Module]:
    """A subclass of a timm attention layer that computes by attn, with the same parameters and arguments.

    It is one class however often it is asked for. `enable` and `disable` make no difference to it; scopes do.

    Raises InputTypeError for a class that never calls scaled_dot_product_attention.
    """
    changed = {
        name: _redirected(function)
        for name, function in _methods(cls).items()
        if mentions(function.__code__, SDPA, RENAMED[SDPA])
    }
    if not changed:
        raise InputTypeError(
            f"attn_layer: {cls.__module__}.{cls.__qualname__} never calls scaled_dot_product_attention"
        )
    setattr(torch.nn.functional, OWN[SDPA], calls.always)  # beside torch's; nothing else has such a name
    if not fused.rel_pos_classes:
        fused.learn(host("timm.layers"), sites())
    body: dict[str, Any] = {
        "__doc__": f"{cls.__module__}.{cls.__qualname__}, computed by attn; everything else is inherited.",
        "__module__": __name__.rpartition(".")[0] if CLASSES.get(cls.__name__) else cls.__module__,
        OWN[FUSED]: property(fused.fused),
        **changed,
    }
    made: type[Module] = type(cls.__name__, (cls,), body)
    return made


def layer(name: str) -> type[nn.Module]:
    """The class of that name in CLASSES. Raises MissingPackageError without timm."""
    where = CLASSES[name]
    module = host(where)
    return attn_layer(getattr(module, name))


def is_attn_layer(module: nn.Module) -> bool:
    """Whether it is of a class that `attn_layer` made, or of a subclass."""
    return hasattr(type(module), OWN[FUSED])


def _methods(cls: type) -> dict[str, FunctionType]:
    found = {}
    for owner in reversed(cls.__mro__):
        for name, member in vars(owner).items():
            function = bare(member)
            if function is not None and not isinstance(member, (staticmethod, classmethod)):
                found[name] = function
            else:
                found.pop(name, None)
    return found


def _redirected(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        renamed(function.__code__, OWN),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = dict(function.__annotations__)
    copy.__doc__ = function.__doc__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return copy
