"""Biases: one kind per file; `base` says what they have in common."""

from .alibi import ALiBi
from .base import AttnBias, Mask
from .cached import Cached
from .causal import Causal
from .convert import as_bias
from .intersection import Intersection
from .key_padding import KeyPadding
from .neighborhood import Neighborhood
from .paged import Paged
from .rel_pos_table import RelPosTable
from .score import Score
from .segments import Segments
from .sum import Sum
from .tensor import TensorBias
from .window import Window

__all__ = [
    "ALiBi",
    "AttnBias",
    "Cached",
    "Causal",
    "Intersection",
    "KeyPadding",
    "Mask",
    "Neighborhood",
    "Paged",
    "RelPosTable",
    "Score",
    "Segments",
    "Sum",
    "TensorBias",
    "Window",
    "as_bias",
]
