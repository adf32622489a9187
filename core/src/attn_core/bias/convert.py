"""as_bias: turns what callers have (tensors, other libraries' mask objects) into biases of the core.

Foreign classes are recognised by dotted name along the MRO, so no foreign library is ever imported for it: importing
`torch.nn.attention.bias` alone costs about a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import InputTypeError
from .base import AttnBias
from .causal import Causal
from .from_flex import from_flex_block_mask
from .from_xformers import BASES, from_xformers
from .tensor import TensorBias

Convert = Callable[[Any], "AttnBias | None"]

_converters: dict[str, Convert] = {}


def as_bias(value: object) -> AttnBias | None:
    """The bias that `value` stands for: None, a bias, a tensor, or an object of a registered foreign class.

    Raises InputTypeError for anything else.
    """
    if value is None or isinstance(value, AttnBias):
        return value
    for cls in type(value).__mro__:
        convert = _converters.get(f"{cls.__module__}.{cls.__qualname__}")
        if convert is not None:
            return convert(value)
    if isinstance(value, Tensor):
        return TensorBias(value)
    if isinstance(value, type) and issubclass(value, AttnBias):
        raise InputTypeError(f"bias: takes an object, got the class {value.__name__}: write {value.__name__}(…)")
    known = ", ".join(["None", "AttnBias", "torch.Tensor", *sorted(_converters)])
    raise InputTypeError(f"bias: takes {known}; got {type(value).__name__}. as_bias.register(...) adds a class")


def register(cls: type | str, convert: Convert) -> None:
    """Make `as_bias` take objects of `cls` (a class, or its dotted name where importing it is dear)."""
    _converters[cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"] = convert


as_bias.register = register  # type: ignore[attr-defined]


def _from_torch_causal_bias(bias: Any) -> Causal:
    corner = "top-left" if bias.variant.name == "UPPER_LEFT" else "bottom-right"
    return Causal(corner).bind(bias.seq_len_q, bias.seq_len_kv)  # type: ignore[arg-type]


for _base in BASES:
    register(_base, from_xformers)
register("torch.nn.attention.bias.CausalBias", _from_torch_causal_bias)
register("torch.nn.attention.flex_attention.BlockMask", from_flex_block_mask)
