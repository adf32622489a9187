"""The model that is measured, with what it is called on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Of all that is drawn here.
SEED = 20261121


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model of `host`, a library that attn has an integration for, on its device, and its arguments by name."""

    name: str
    host: str
    model: nn.Module
    inputs: Mapping[str, Tensor]

    def __call__(self) -> Any:
        """What the model gives for the inputs."""
        return self.model(**self.inputs)

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return next(iter(self.inputs.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.model.parameters()).dtype

    @property
    def parameters(self) -> int:
        """How many numbers its parameters are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def shapes(self) -> str:
        """The inputs in words, such as "pixel_values [1, 3, 224, 224]"."""
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
