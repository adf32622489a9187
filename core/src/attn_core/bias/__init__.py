"""Biases: one kind per file; `base` says what they have in common."""

from .alibi import ALiBi
from .base import AttnBias, Mask
from .block_mask import BlockMask
from .cached import Cached
from .causal import Causal
from .convert import as_bias
from .intersection import Intersection
from .key_padding import KeyPadding
from .mask_function import MaskMod, mask_mod
from .neighborhood import Neighborhood
from .paged import Paged
from .prefix_lm import PrefixLM
from .rel_pos_table import RelPosTable
from .score import Score
from .score_function import ScoreMod, score_mod
from .segments import Segments
from .sum import Sum
from .tensor import TensorBias
from .torch_names import CausalBias, CausalVariant, causal_lower_right, causal_upper_left
from .window import Window

__all__ = [
    "ALiBi",
    "AttnBias",
    "BlockMask",
    "Cached",
    "Causal",
    "CausalBias",
    "CausalVariant",
    "Intersection",
    "KeyPadding",
    "Mask",
    "MaskMod",
    "Neighborhood",
    "Paged",
    "PrefixLM",
    "RelPosTable",
    "Score",
    "ScoreMod",
    "Segments",
    "Sum",
    "TensorBias",
    "Window",
    "as_bias",
    "causal_lower_right",
    "causal_upper_left",
    "mask_mod",
    "score_mod",
]
