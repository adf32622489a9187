"""cuda-ref/simple in the emulator beside the reference: what the conformance kit does not single out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core import AttnBias, Causal, KeyPadding, Segments, Window, attention
from attn_core.registry import registry
from attn_core.testing.budget import compare
from attn_core.testing.naive import naive_attention
from attn_core.reference import reference_attention
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from biases_to_try import BATCH, HEADS, SEED, grids, masks, scores
from emulated import simple

NAME = simple().name


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with registry.register(simple()):
        yield
