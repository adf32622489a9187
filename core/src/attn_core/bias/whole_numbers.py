"""What counts something, as an argument: an int, or many in a tensor.

An int is what Python takes for an index, NumPy's integers among them; it is held as a plain one. True and False are
none, and no tensor is, whose number would have to be read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..tracing import is_traced

_INTEGERS = (int, torch.SymInt)  # the latter where a graph is traced


def as_int(value: Any) -> Any:
    """The plain int that it is, or the symbolic one where a graph is traced; what is no int is returned as it is."""
    if is_traced() and isinstance(value, int):  # of which dynamo may not know the type any nearer
        return value
    if type(value) is int or isinstance(value, (bool, torch.SymInt, Tensor)) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array of many, or of what is no int
        return value


def is_int(value: Any) -> bool:
    """Whether it is a plain int or a symbolic one; True and False are none."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is an int, and `least` or more."""
    return is_int(value) and value >= least


def is_length(value: Any) -> bool:
    """Whether it is an int, and 0 or more; a symbolic one is not compared, as that would be a guard."""
    return is_int(value) and (type(value) is not int or value >= 0)


def whole_numbers(kind: str, name: str, given: Any, rank: int) -> Tensor:
    """The integer tensor of this rank that was given, or that the nested sequence of ints makes."""
    values: Tensor
    if isinstance(given, Tensor):
        values = given
    else:
        if isinstance(given, str) or not _are_ints(given, rank):
            raise InputTypeError(f"{kind}: {name} must be an integer tensor, or ints in sequences, got {given!r}")
        rows = [len(row) for row in given] if rank == 2 else []
        if len(set(rows)) > 1:
            raise InputError(f"{kind}: {name} must have rows of one length, got {rows}")
        # The CPU, whatever the default device is: what is there can be checked.
        plain = [list(map(as_int, row)) for row in given] if rank == 2 else list(map(as_int, given))
        made = torch.tensor(plain, device="cpu").long()
        values = made.reshape(len(rows), rows[0] if rows else 0) if rank == 2 else made
    if values.is_floating_point() or values.dtype is torch.bool or values.is_complex():
        raise InputTypeError(f"{kind}: {name} must be an integer tensor, got {values.dtype}")
    if values.ndim != rank:
        wanted = "[batch, max_pages]" if rank == 2 else "[batch]"
        raise InputError(f"{kind}: {name} must be {wanted}, got shape {list(values.shape)}")
    return values


def _are_ints(values: Any, rank: int) -> bool:
    if rank == 0:
        return is_int(as_int(values))
    return isinstance(values, Sequence) and all(_are_ints(value, rank - 1) for value in values)


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at now: those on a device must be waited for, and a traced tensor has none."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not is_traced()


def shown(values: Tensor) -> str:
    """Values for people, where they can be had at once and are few."""
    return str(values.tolist()) if is_readable(values) and values.numel() <= 64 else f"<{values.device}>"
