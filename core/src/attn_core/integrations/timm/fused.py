"""The flag `fused_attn`: which modules that have it off may call scaled_dot_product_attention all the same.

Off, a module multiplies and takes the softmax by itself. Both ways compute the same, with two exceptions, in which the
module keeps its own way:
- A module for relative positions that is not one of timm's. The one way asks it for its bias, the other hands it the
  logits and the bias that blocks share, and what it does with these is its own affair.
- Dropout of the weights, in training, where the module does not hand it to scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import calls
from .sites import Site, passes_dropout

#: timm's modules for relative positions: they add their bias, and nothing else.
REL_POS = ("RelPosBias", "RelPosMlp", "RelPosBiasTf")

#: The same as classes; `learn` sets these two, for timm is not imported here.
rel_pos_classes: tuple[type, ...] = ()
#: Classes that call scaled_dot_product_attention without dropout.
without_dropout: tuple[type, ...] = ()


def learn(layers: Any, sites: Iterable[Site]) -> None:
    """Tells this module what it has to know of timm: its `layers`, and the places that call torch's attention."""
    global rel_pos_classes, without_dropout
    rel_pos_classes = tuple(getattr(layers, name) for name in REL_POS if hasattr(layers, name))
    without_dropout = tuple(site.owner for site in sites if site.owner is not None and not passes_dropout(site.stock))


@torch.jit.unused  # scripting compiles properties, but for these
def fused(module: Any) -> bool:
    """What a redirected method reads in the place of `self.fused_attn`."""
    return bool(module.fused_attn or (reason_against(module) is None and not calls.is_recorded()))


def reason_against(module: nn.Module) -> str | None:
    """Why a module that has `fused_attn` off must be left so; None where it need not."""
    rel_pos = getattr(module, "rel_pos", None)
    if rel_pos is not None and type(rel_pos) not in rel_pos_classes:
        return (
            f"fused_attn is off, and what {type(rel_pos).__name__} adds to the logits may differ from its get_bias();"
            " set fused_attn=True on the module if it does not"
        )
    if module.training and isinstance(module, without_dropout) and dropout_of(module) > 0:
        return "fused_attn is off, and with it on, timm would leave out the dropout of this module in training"
    return None


def dropout_of(module: nn.Module) -> float:
    """The probability of dropping a weight, in training; 0.0 for a module that knows no such thing."""
    return float(getattr(getattr(module, "attn_drop", None), "p", 0.0))
