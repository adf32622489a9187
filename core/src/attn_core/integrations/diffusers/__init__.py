"""diffusers: models run their attention by attn, in one line.

from attn_core.integrations import diffusers as attn_diffusers

attn_diffusers.enable()
pipe.transformer(…)                                 # a model that chose no backend: by attn
pipe.transformer.set_attention_backend("attn")      # one that is to choose it: the same, by name
"""

from .calls import attention_forward
from .reporting import report
from .switch import NAME, TESTED, disable, enable, is_enabled

__all__ = ["NAME", "TESTED", "attention_forward", "disable", "enable", "is_enabled", "report"]
