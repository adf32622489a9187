"""How a compiled extension takes its arguments and refuses them: by position, by type, and with RuntimeError."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What pybind11 takes for a parameter that is annotated so. It calls anything a bool that can be asked for one.
TAKES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "Tensor | None": (Tensor, type(None)),
    "Generator | None": (torch.Generator, type(None)),
    "float": (float, int),
    "int": (int,),
    "bool": (object,),
}


def extension(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a compiled module: its arguments have no names there, and no defaults."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        fits = len(args) == len(parameters) and not named
        if not fits or not all(isinstance(x, TAKES[p.annotation]) for x, p in zip(args, parameters.values())):
            given = ", ".join([type(x).__name__ for x in args] + [f"{name}=" for name in named])
            takes = ", ".join(f"{p.name}: {p.annotation}" for p in parameters.values())
            raise TypeError(f"{function.__name__}(): incompatible function arguments. Takes ({takes}); given ({given})")
        with torch.no_grad():  # what is compiled is no operation of autograd
            return function(*args)

    return call


def check(holds: object, message: str) -> None:
    """TORCH_CHECK."""
    if not holds:
        raise RuntimeError(message)


def check_shape(name: str, x: Tensor, *shape: int) -> None:
    check(x.shape == shape, f"{name} must have shape {shape}, has {tuple(x.shape)}")


def check_device(**tensors: Tensor) -> None:
    """For these doubles the CPU is the GPU."""
    for name, x in tensors.items():
        check(x.device.type == "cpu", f"{name} must be on CUDA")


def check_int32(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        check(x.dtype == torch.int32, f"{name} must have dtype int32")
        check(x.is_contiguous(), f"{name} must be contiguous")
    check_device(**tensors)


def check_launch(blocks: int) -> None:
    """A kernel cannot be launched on a grid of no blocks."""
    check(blocks > 0, "CUDA error: invalid configuration argument")
