"""Memory for what is made on the way, used again for every batch of blocks."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Contiguous tensors for one call, in the dtype in which its matrices are multiplied."""

    def __init__(self, like: Tensor) -> None:
        # Many CPUs have no fast products in half precision.
        self._dtype = wide(like) if like.device.type == "cpu" else like.dtype
        self._device = like.device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """With any contents. What was taken by this name before is no longer valid."""
        size = prod(shape)
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return flat[:size].view(shape)

    def matrices(self, name: str, view: Tensor, rows: int) -> Tensor:
        """A copy of `[..., dim]` as `[matrices, rows, dim]`."""
        copy = self.take(name, *view.shape)
        copy.copy_(view)
        return copy.view(prod(view.shape[:-1]) // rows, rows, view.shape[-1])


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which many are added up."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
