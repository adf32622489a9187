"""What a problem makes of a text: the constants that it is compiled with, and the arguments that its bias adds.

Head sizes, the dtype and the kinds of bias are constants; lengths, strides and the batch are arguments, so that a model
whose lengths change compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .launcher import Argument
from .translate import NUMBERS, Bias

#: Of a block, as simple_tile.cuh has them.
LANES, ROWS = 8, 16
THREADS = LANES * ROWS


def constants(dtype: torch.dtype, head_dim: int, head_dim_v: int, bias: Bias, softcap: bool) -> dict[str, str | int]:
    """Of the kernels of cuda-ref/simple."""
    parameters = _parameters(bias)
    mask, scores = _written(bias)
    return {
        "ELEMENT": NUMBERS[dtype],
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "SOFTCAP": int(softcap),
        "MASK": bias.mask,
        "MASK_ARGUMENTS": mask,
        "SCORE": nested("Plus", bias.scores) if bias.scores else "NoScore",
        "SCORE_ARGUMENTS": scores,
        "BIAS_PARAMETERS": "".join(f", {type} {name}" for type, name in parameters),
    }


def nested(pair: str, types: Sequence[str]) -> str:
    """One type of several, two at a time."""
    first, *others = types
    for other in others:
        first = f"{pair}<{first}, {other}>"
    return first


def arguments(bias: Bias) -> list[Argument]:
    """What the parameters of a bias are given."""
    found: list[Argument] = []
    for code, value in _values(bias):
        found.append(value)
        if code == "s":
            assert isinstance(value, Tensor)
            found += strides(value)
    return found


def strides(tensor: Tensor) -> list[int]:
    """0 for a dimension of size 1: every index reads the one that there is."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride())]


def _values(bias: Bias) -> Iterator[tuple[str, Tensor | int]]:
    """(code, value) of all fields."""
    tensors, numbers = iter(bias.tensors), iter(bias.numbers)
    for code in bias.mask_fields + "".join(bias.score_fields):
        if code in "ts":
            yield code, next(tensors)
        elif code == "n":
            yield code, next(numbers)


def _parameters(bias: Bias) -> list[tuple[str, str]]:
    """(type, name) of each argument."""
    types: list[str] = []
    for code, value in _values(bias):
        if isinstance(value, Tensor):
            types.append(f"const {NUMBERS[value.dtype]}*")
            types += ["long long"] * (value.ndim if code == "s" else 0)
        else:
            types.append("long long")
    return [(type, f"bias_{i}") for i, type in enumerate(types)]


def _written(bias: Bias) -> tuple[str, str]:
    """What mask and score are made of, by the names of parameters; C++ takes a comma at the end of a list."""
    names = iter(name for _, name in _parameters(bias))
    tensors = iter(bias.tensors)

    def written(fields: str) -> str:
        text = ""
        for code in fields:
            if code in "{}":
                text += code if code == "{" else "}, "
                continue
            count = 1
            if code in "ts":
                rank = next(tensors).ndim
                count += rank if code == "s" else 0
            text += "".join(f"{next(names)}, " for _ in range(count))
        return text

    mask = written(bias.mask_fields)
    if not bias.scores:
        return mask, ""
    score = written(bias.score_fields[0])
    for fields in bias.score_fields[1:]:
        score = f"{{{score}}}, {{{written(fields)}}}, "
    return mask, score


# Shared memory, as the texts take it


def _padded(dim: int) -> int:
    return -(-dim // LANES) * LANES


def _bytes(rows: int, width: int) -> int:
    """Of an array of float, at a multiple of 16 bytes."""
    return -(-rows * width * 4 // 16) * 16


def walked_forward(head_dim: int, head_dim_v: int) -> int:
    """Keys in a tile of the forward."""
    return 32 if max(head_dim, head_dim_v) <= 128 else 16


def walked_backward(head_dim: int, head_dim_v: int) -> int:
    """Keys, or queries, in a tile of the backward."""
    return 16 if max(head_dim, head_dim_v) <= 128 else 8


def forward_bytes(head_dim: int, head_dim_v: int) -> int:
    walked = walked_forward(head_dim, head_dim_v)
    own, tiles = _bytes(ROWS, _padded(head_dim) + 1), _tiles(walked, head_dim, head_dim_v)
    return own + tiles + _bytes(ROWS, walked + 1)


def gradient_bytes(head_dim: int, head_dim_v: int, weights: int) -> int:
    """Of a launch of the backward that keeps so many numbers for each pair of a tile."""
    walked = walked_backward(head_dim, head_dim_v)
    own, tiles = _tiles(ROWS, head_dim, head_dim_v), _tiles(walked, head_dim, head_dim_v)
    return own + tiles + weights * _bytes(ROWS, walked + 1)


def _tiles(rows: int, head_dim: int, head_dim_v: int) -> int:
    return _bytes(rows, _padded(head_dim) + 1) + _bytes(rows, _padded(head_dim_v) + 1)
