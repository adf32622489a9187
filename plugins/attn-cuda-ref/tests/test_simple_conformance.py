"""Of the conformance kit, what a small part of the declaration claims: one dtype, some sizes, a few kinds of bias.

All of it takes minutes, most of them for compiling: `every_check_emulated.py`, which `nox -s cuda_emulated` runs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_core import Cached, Causal, Neighborhood, Segments
from attn_core.conformance.parametrize import rows

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emulated import simple


def some_of_it():
    """The kernel, which claims less."""
    (declared,) = simple().declarations
    less = replace(
        declared,
        dtypes=frozenset({torch.bfloat16}),
        head_dims=frozenset({15, 32}),
        head_dims_v=frozenset({15, 32}),
        biases=frozenset({Causal("top-left"), Cached, Neighborhood, Segments}),
        compile=False,
    )
    return replace(simple(), name="emulated/simple-in-part", capabilities=less)


def is_quick(row) -> bool:
    """Not those of tens of thousands of blocks, nor problems of real models."""
    return "65537" not in row.name and "recorded" not in row.name


@pytest.mark.parametrize("check", [pytest.param(row, id=row.name) for row in rows([some_of_it()]) if is_quick(row)])
def test_simple(check) -> None:
    check()
