"""What of torch is replaced while calls are redirected.

torch.nn.functional.scaled_dot_product_attention, and, for nn.MultiheadAttention and nn.TransformerEncoderLayer, the
names `F` and `torch` in the two modules that these are in. Their native path goes past SDPA, and whether it is on is
one flag for the process (torch.backends.mha); torch.compile has rules for torch's functions by name, which it takes
from the attributes when it first traces. So those attributes stay what they are, and only what these two modules see is
ours.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.modules import activation, transformer

from .functions import Function, redirecting_fastpath, redirecting_mha, redirecting_sdpa
from .redirection import Asked, Options, asked_here, options_here
from .replaced import Installation, Replaced
from .shadow import ShadowGlobals, shadow_module


class Functions:
    """torch's functions as those see them whose calls `options_of` (for eager calls) and `asked_of` (for traced ones)
    redirect."""

    def __init__(self, options_of: Callable[[], Options | None], asked_of: Callable[[], Asked | None]) -> None:
        self._asks = options_of, asked_of
        self.sdpa = self.sdpa_over(F.scaled_dot_product_attention)

        stock = F.multi_head_attention_forward
        stock_sdpa = F.scaled_dot_product_attention
        within = ShadowGlobals(vars(F), lambda value, module: self.sdpa if value is stock_sdpa else value)
        within.refresh()
        self.mha = redirecting_mha(stock, within.rebound(cast(FunctionType, stock)), *self._asks)

        self.get_fastpath_enabled = redirecting_fastpath(torch.backends.mha.get_fastpath_enabled, *self._asks)
        mha = shadow_module(torch.backends.mha, {"get_fastpath_enabled": self.get_fastpath_enabled})
        self.backends = shadow_module(torch.backends, {"mha": mha})

    def sdpa_over(self, original: Function) -> Function:
        """What stands in for `original`, an F.scaled_dot_product_attention."""
        return redirecting_sdpa(original, *self._asks)

    def functional(self, **changes: Any) -> ModuleType:
        """torch.nn.functional, with a multi_head_attention_forward that calls `sdpa`, and with `changes`."""
        return shadow_module(F, {"multi_head_attention_forward": self.mha, **changes})


def _attributes() -> list[Replaced]:
    functions = Functions(options_here, asked_here)
    functional = functions.functional()
    shadow = shadow_module(torch, {"backends": functions.backends})
    return [
        Replaced(F, "scaled_dot_product_attention", functions.sdpa_over),
        Replaced(activation, "F", lambda original: functional),
        Replaced(activation, "torch", lambda original: shadow),
        Replaced(transformer, "torch", lambda original: shadow),
    ]


installation = Installation(_attributes)
