"""Biases: one kind per file; `base` says what they have in common."""

from .base import AttnBias, Mask
from .causal import Causal
from .convert import as_bias
from .intersection import Intersection
from .key_padding import KeyPadding
from .neighborhood import Neighborhood
from .segments import Segments
from .tensor import TensorBias
from .window import Window

__all__ = [
    "AttnBias",
    "Causal",
    "Intersection",
    "KeyPadding",
    "Mask",
    "Neighborhood",
    "Segments",
    "TensorBias",
    "Window",
    "as_bias",
]
