"""What is asked of any operand: a plain tensor, its rank, dtype, device and sizes."""

from __future__ import annotations

from typing import Any

import torch
from attn_core.errors import InputTypeError
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ConstraintError, UnsupportedError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: Any) -> None:
    """Raises InputTypeError for what is no tensor, UnsupportedError for one that is nested or not strided."""
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name}: takes a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise UnsupportedError(f"{name}: takes plain tensors here, got a nested one")
    if tensor.layout is not torch.strided:
        raise UnsupportedError(f"{name}: takes plain tensors, got one of layout {tensor.layout}")


def check_rank(name: str, tensor: Tensor, names: tuple[str, ...]) -> None:
    """Raises ConstraintError for another number of dimensions than there are names for."""
    if tensor.ndim != len(names):
        want = ", ".join(names)
        raise ConstraintError(
            f"{name}: must be [{want}], {len(names)} dimensions; got {tensor.ndim} (shape {shape_of(tensor)})"
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises ConstraintError for another than float64, float32, float16 and bfloat16."""
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(plain(dtype) for dtype in DTYPES)
        raise ConstraintError(f"{name}: dtype must be one of {accepted}, got {plain(tensor.dtype)}")


def check_agrees(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ConstraintError for another dtype or device. Dtypes that autocast makes one are one."""
    if tensor.dtype != like.dtype and _under_autocast(tensor) != _under_autocast(like):
        raise ConstraintError(f"{name}: must have {like_name}'s dtype {plain(like.dtype)}, got {plain(tensor.dtype)}")
    if tensor.device != like.device:
        raise ConstraintError(f"{name}: must be on {like_name}'s device {like.device}, got {tensor.device}")


def _under_autocast(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, has the tensor computed in: its own for float64."""
    device = tensor.device.type
    if tensor.dtype is torch.float64 or not torch.amp.autocast_mode.is_autocast_available(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_size(name: str, tensor: Tensor, dim: int, called: str, like_name: str, size: int) -> None:
    """Raises ConstraintError, with what the dimension is called, where it is not of that size."""
    if tensor.shape[dim] != size:
        at = dim % tensor.ndim
        raise ConstraintError(
            f"{name}: {called} (dimension {at}) must be {like_name}'s {size}, got {tensor.shape[dim]}"
            f" (shape {shape_of(tensor)})"
        )


def has_tangents(*tensors: Tensor) -> bool:
    """Whether one of them is a dual tensor of the forward-mode level that is entered now."""
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual  # not typed
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def plain(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> list[int]:
    """As a list, which prints without its class."""
    return list(tensor.shape)
