"""The demo's second half: the patches of a photograph attend each other under three biases.

A patch is 8 x 8 pixels, a colour is a head: 1,024 tokens, 3 heads, head_dim 64. Patches are compared by what they look
like, and their pixels are mixed accordingly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias, Causal, TensorBias, Window
from ..functional import attention
from ..record import record
from ..reference import reference_attention
from ..testing.budget import Comparison, compare
from ..testing.naive import naive_attention

SIZE = 256  #: of the square that is cut out of the photograph, in pixels
PATCH = 8  #: in pixels
GRID = SIZE // PATCH
#: Of the cosines between patches: how much the most similar ones count.
SCALE = 10.0


def distance() -> Tensor:
    """`[patches, patches]`: minus a tenth of the distance on the photograph, in patches."""
    place = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
    return -0.1 * torch.cdist(place, place)


#: The biases: what to call each, and how it is made.
PHOTOGRAPH: tuple[tuple[str, Callable[[], AttnBias]], ...] = (
    ("Causal(): patches before", Causal),
    ("Window(40, 40): patches beside", lambda: Window(40, 40)),
    ("TensorBias: nearer in two dimensions counts more", lambda: TensorBias(distance())),
)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One attention over the patches, beside the reference."""

    name: str
    patches: int
    keys: float  #: that a query sees, on average
    kernel: str
    seconds: float
    error: float  #: the largest difference from the reference
    allowed: float  #: by the error budget, where the difference comes nearest to it
    comparison: Comparison


def attend(named: tuple[str, Callable[[], AttnBias]], tell: Callable[[str], None]) -> Attended:
    """Runs one attention over the photograph's patches. `tell` is called with what begins."""
    name, make = named
    tell(f"photograph under {name.partition(':')[0]}")
    pixels = patches(photograph())
    looks = torch.nn.functional.normalize(pixels - pixels.mean(-1, keepdim=True), dim=-1)
    bias = make()
    with record() as calls:
        start = time.perf_counter()
        out = attention(looks, looks, pixels, bias, scale=SCALE)
        seconds = time.perf_counter() - start
    (row,) = calls.rows()
    reference, _ = reference_attention(looks, looks, pixels, bias, scale=SCALE)
    naive, _ = naive_attention(looks, looks, pixels, bias, scale=SCALE)
    comparison = compare("out", out, reference, naive, out.dtype)
    assert comparison.allowed is not None
    return Attended(
        name=name,
        patches=pixels.shape[1],
        keys=bias.bind(pixels.shape[1], pixels.shape[1]).pairs() / pixels.shape[1],
        kernel=row.kernel,
        seconds=seconds,
        error=float((out - reference).abs().max()),
        allowed=comparison.allowed,
        comparison=comparison,
    )


def photograph() -> Tensor:
    """`[SIZE, SIZE, 3]` in [0, 1]: the face of an astronaut, from scikit-image."""
    data: Any = import_module("skimage.data")
    return torch.from_numpy(data.astronaut())[:SIZE, 96 : 96 + SIZE].float() / 255.0


def patches(picture: Tensor) -> Tensor:
    """`[1, patches, 3, PATCH * PATCH]`: heads-last, a colour is a head."""
    grid = picture.reshape(GRID, PATCH, GRID, PATCH, 3)  # row, y, column, x, colour
    return grid.permute(0, 2, 4, 1, 3).reshape(1, GRID * GRID, 3, PATCH * PATCH)
