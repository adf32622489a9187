"""Lengths of keys that lie on a device, as the sequence of ints that xFormers' bias objects keep beside the tensor.

Its operators read the tensor; only what is there for people (`materialize`) reads the ints. They are fetched when
somebody does, so that no call waits for its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor


class LengthsOnDevice(Sequence[int]):
    """`[batch]` integers of a tensor; reading one waits for the tensor's device."""

    def __init__(self, seqlens: Tensor) -> None:
        self._seqlens = seqlens

    def __len__(self) -> int:
        return self._seqlens.shape[0]

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        found: int | list[int] = self._seqlens[index].tolist()
        return found

    def __repr__(self) -> str:
        return f"LengthsOnDevice({self._seqlens.tolist()})"
