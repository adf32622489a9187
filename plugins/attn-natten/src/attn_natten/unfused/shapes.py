"""Dimensions taken apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def apart(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`dim` as several dimensions of these sizes, a view whatever the strides."""
    result: Tensor = tensor.unflatten(dim, tuple(sizes))  # type: ignore[no-untyped-call]
    return result
