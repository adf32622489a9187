"""timm: every model's attention by attn, or that of single models by a class to build them of.

from attn_core.integrations import timm as attn_timm

attn_timm.enable()                    # all models, made before or after
print(attn_timm.report(model))        # which modules are redirected, which are not, and why
attn_timm.disable()                   # timm as it came

timm.create_model("vit_base_patch16_224", attn_layer=attn_timm.Attention)       # this model, and nothing else
"""

from __future__ import annotations

from typing import Any

from ..reported import Report, ReportRow
from .host import TESTED
from .layers import CLASSES, attn_layer, layer
from .reporting import report
from .switch import disable, enable, is_enabled

__all__ = [
    "TESTED",
    "Report",
    "ReportRow",
    "attn_layer",
    "disable",
    "enable",
    "is_enabled",
    "report",
]


def __getattr__(name: str) -> Any:
    """`Attention` and the other classes of `CLASSES`, made when they are asked for: each is a subclass of timm's."""
    if name in CLASSES:
        return layer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *CLASSES])
