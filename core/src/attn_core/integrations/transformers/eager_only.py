"""Models that are made for "eager" alone, and are set to a name of attn's all the same.

Forced by the host: it does not set such a model to "sdpa", but where a name is not one of its own it does not ask. Some
read the numbers in their mask, or add it to logits that they compute themselves; some say that they are causal where
they are not, for "eager" asks the mask alone. A boolean mask would mean something else there, and none would be taken
for causal. So these get the masks that "eager" makes, and where they give none, nothing is masked.

A model with a softcap is made for "eager" alone for another reason: torch's attention has none.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ...calling_module import modules_at_hand
from ...tracing import constant

#: Of a configuration, by which a model says that it may have a softcap.
SOFTCAP = "attn_logit_softcapping"

#: id -> a configuration, and what its model says.
_known: dict[int, tuple[weakref.ref[Any], bool]] = {}


@constant
def is_for_eager_alone(config: Any) -> bool:
    """Whether the model of this configuration, whose forward is running, is made for "eager" alone."""
    key = id(config)
    known = _known.get(key)
    if known is not None and known[0]() is config:
        return known[1]
    model = _model_of(config)
    if model is None:
        return False
    found = not (model._supports_sdpa or hasattr(config, SOFTCAP))
    _known[key] = weakref.ref(config, lambda _: _known.pop(key, None)), found
    return found


def _model_of(config: Any) -> nn.Module | None:
    """The model, where it is running or within one that is."""
    for running in modules_at_hand():
        for module in running.modules():
            if getattr(module, "config", None) is config and hasattr(module, "_supports_sdpa"):
                return module
    return None
