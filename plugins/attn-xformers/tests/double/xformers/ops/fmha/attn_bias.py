"""Bias objects. Each one's meaning is its dense form: 0 where a query may attend a key, -inf where it may not."""

from dataclasses import dataclass, replace

import torch

INFINITY = float("inf")


def band(rows, columns, left, right, from_bottom_right):
    """0 and -inf: `left` keys before the diagonal, the one on it, `right` behind; None: no limit."""
    shift = columns - rows if from_bottom_right else 0
    distance = torch.arange(columns)[None] - (torch.arange(rows)[:, None] + shift)
    kept = torch.ones(rows, columns, dtype=torch.bool)
    if left is not None:
        kept &= distance >= -left
    if right is not None:
        kept &= distance <= right
    return torch.zeros(rows, columns).masked_fill(~kept, -INFINITY)


class AttentionBias:
    def sides(self):
        """(left, right, whether from the bottom right) of the band that it is, or that each block is."""
        raise NotImplementedError

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return band(*shape[-2:], *self.sides()).to(device, dtype).expand(shape)


class LowerTriangularMask(AttentionBias):
    def sides(self):
        return None, 0, False


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    def sides(self):
        return None, 0, True


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def sides(self):
        return self._window_size - 1, 0, True


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def sides(self):
        return self.window_left, self.window_right, True


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    def intervals(self):
        return zip(self.seqstart_py, self.seqstart_py[1:])

    def to(self, device):
        return replace(self, seqstart=self.seqstart.to(device))


@dataclass
class _LengthsInRoom(_SeqLenInfo):
    """Keys that fill a part of what lies between two starts."""

    seqlen: torch.Tensor
    seqlen_py: list
    padding: int = 0

    def intervals(self):
        return [(start, start + size) for start, size in zip(self.seqstart_py, self.seqlen_py)]

    def to(self, device):
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))


def of_lengths(seqlens):
    starts = [0]
    for size in seqlens:
        starts.append(starts[-1] + size)
    return _SeqLenInfo(torch.tensor(starts, dtype=torch.int32), max(seqlens), min(seqlens), starts)


def in_room(starts, seqlens, padding=0):
    tensors = (torch.tensor(list(values), dtype=torch.int32) for values in (starts, seqlens))
    seqstart, seqlen = tensors
    return _LengthsInRoom(seqstart, max(seqlens), min(seqlens), list(starts), seqlen, list(seqlens), padding)


@dataclass
class _Blocks(AttentionBias):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def sides(self):
        return None, None, False

    def to(self, device):
        return replace(self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device))

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        if (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]) != tuple(shape[-2:]):
            raise ValueError(f"made for {self.q_seqinfo.seqstart_py}, {self.k_seqinfo.seqstart_py}, got {shape}")
        mask = torch.full(shape[-2:], -INFINITY)
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals()):
            mask[q0:q1, k0:k1] = band(q1 - q0, k1 - k0, *self.sides())
        return mask.to(device, dtype).expand(shape)


@dataclass
class BlockDiagonalMask(_Blocks):
    _batch_sizes: list | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(of_lengths(q_seqlen), of_lengths(kv_seqlen if kv_seqlen is not None else q_seqlen)).to(device)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    def sides(self):
        return None, 0, False


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def __post_init__(self):
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals()):
            if k1 - k0 < q1 - q0:
                raise ValueError(f"Expected `num_keys >= num_queries`, got {k1 - k0} and {q1 - q0}")

    def sides(self):
        return None, 0, True


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def __post_init__(self):
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals()):
            if q1 - q0 - self._window_size >= k1 - k0:
                raise RuntimeError("No keys are attended")

    def sides(self):
        return self._window_size - 1, 0, False


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0

    def sides(self):
        return self._window_size - 1, 0, True


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None):
        starts = range(0, len(kv_seqlen) * kv_padding + 1, kv_padding)
        return cls(of_lengths(q_seqlen), in_room(starts, kv_seqlen, kv_padding)).to(device)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    def sides(self):
        return None, 0, True


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int

    def sides(self):
        return self.window_left, self.window_right, True


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _window_size: int

    def sides(self):
        return self._window_size - 1, 0, True


@dataclass
class BlockDiagonalGappyKeysMask(_Blocks):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        return cls(of_lengths(q_seqlen), in_room(kv_seqstarts, kv_seqlen)).to(device)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    def sides(self):
        return None, 0, True
