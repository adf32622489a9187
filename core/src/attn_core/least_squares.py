"""Least squares with constants that cannot be negative: no work takes less than no time."""

from __future__ import annotations

import torch
from torch import Tensor

#: Times an unknown may enter or leave; each is one small system.
STEPS = 200
#: A relative error above this counts no more than linearly: one time that a neighbour spoilt must not bend the rest.
TOLERATED = 0.25


def relative_least_squares(quantities: Tensor, seconds: Tensor, rounds: int = 8) -> Tensor:
    """Constants >= 0 for which `quantities @ constants` is near `seconds`, by the relative error.

    Args:
        quantities: float64 `[problems, constants]`.
        seconds: float64 `[problems]`, above 0.

    Returns float64 `[constants]`. A time far from what the others say weighs less, anew in each round.
    """
    shares = quantities / seconds[:, None]
    scale = shares.abs().amax(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    shares = shares / scale  # constants differ by ten orders of magnitude
    target = torch.ones_like(seconds)
    weights = torch.ones_like(seconds)
    found = torch.zeros_like(scale)
    for _ in range(rounds):
        root = weights.sqrt()
        found = nonnegative_least_squares(shares * root[:, None], target * root)
        off = (shares @ found - 1).abs()
        weights = TOLERATED / off.clamp(min=TOLERATED)
    return found / scale


def nonnegative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """`x >= 0` that makes `|matrix @ x - target|` least; float64 (Lawson and Hanson's active set).

    Of columns that say the same, one gets all.
    """
    count = matrix.shape[1]
    free = torch.zeros(count, dtype=torch.bool)
    x = torch.zeros(count, dtype=matrix.dtype)
    enough = 1e-10 * max(1.0, float((matrix.T @ target).abs().amax())) if count else 0.0
    for _ in range(STEPS):
        slope = (matrix.T @ (target - matrix @ x)).masked_fill(free, float("-inf"))
        if count == 0 or float(slope.amax()) <= enough:
            break
        free[int(slope.argmax())] = True
        while bool(free.any()):
            candidate = torch.zeros_like(x)
            candidate[free] = torch.linalg.lstsq(matrix[:, free], target.unsqueeze(1), driver="gelsd").solution[:, 0]
            if bool((candidate[free] > 0).all()):
                x = candidate
                break
            below = free & (candidate <= 0)
            steps = x[below] / (x[below] - candidate[below])
            x = x + float(steps.amin()) * (candidate - x)
            stuck = below & (x <= 1e-15 * (1 + x.abs().amax()))
            stuck[torch.nonzero(below)[int(steps.argmin()), 0]] = True  # it is at 0, whatever is rounded
            free &= ~stuck
            x = x.masked_fill(~free, 0.0)
    return x
