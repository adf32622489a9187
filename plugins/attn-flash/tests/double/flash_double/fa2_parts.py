"""What the five functions of FA2's extension have in common: their checks, windows, ALiBi and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from .arithmetic import Rules
from .extension import check, check_device, check_shape
from .sequences import garbage

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
PAGE_MULTIPLE = 256


def check_operands(q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> None:
    """Dtypes, devices and strides."""
    check(q.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    operands = {"q": q, "k": k, "v": v} | others
    for name, x in operands.items():
        check(x.dtype == q.dtype, f"query and {name} must have the same dtype")
        check(x.stride(-1) == 1, f"{name}: Input tensor must have contiguous last dimension")
    check_device(**operands)


def check_problem(batch: int, head_dim: int, heads: int, heads_k: int, softcap: float, p_dropout: float) -> None:
    check(batch > 0, "batch size must be positive")
    check(head_dim <= MAX_HEAD_DIM, "FlashAttention forward only supports head dimension at most 256")
    check(heads % heads_k == 0, "Number of heads in key/value must divide number of heads in query")
    check(softcap <= 0 or p_dropout == 0, "Softcapping does not support dropout for now")
    check(p_dropout < 1, "Expected p_dropout < 1.f to be true")


def check_pages(k: Tensor, v: Tensor, table: Tensor, batch: int, heads_k: int, head_dim: int) -> None:
    check_device(block_table=table)
    check(table.dtype == torch.int32, "block_table must have dtype torch.int32")
    check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
    num_pages, page_size = k.shape[:2]
    check(page_size % PAGE_MULTIPLE == 0, "Paged KV cache block size must be divisible by 256")
    check_shape("k", k, num_pages, page_size, heads_k, head_dim)
    check_shape("v", v, num_pages, page_size, heads_k, head_dim)
    check_shape("block_table", table, batch, table.shape[1])


def written_into(given: Tensor | None, like: Tensor) -> Tensor:
    """The tensor that a result is written into, before it is written."""
    if given is None:
        return garbage(*like.shape, dtype=like.dtype)
    check(given.dtype == like.dtype, "Output must have the same dtype as inputs")
    check(given.stride(-1) == 1, "Output tensor must have contiguous last dimension")
    check_shape("out", given, *like.shape)
    return given.fill_(math.nan)


def rules(
    scale: float, softcap: float, p_dropout: float, causal: bool, left: int, right: int, seqlen_k: int
) -> Callable[[Tensor | None, int], Rules]:
    """What the kernels are told for given slopes of ALiBi and a batch entry; `seqlen_k` is the longest sequence's."""
    left, right = (-1 if limit >= seqlen_k else limit for limit in (left, right))
    if causal:
        right = 0
    by_key = left < 0 and right == 0
    if left < 0 <= right:
        left = seqlen_k
    elif right < 0 <= left:
        right = seqlen_k

    def ruled(slopes: Tensor | None, entry: int) -> Rules:
        return Rules(
            scale=scale,
            softcap=softcap,
            left=None if by_key or left < 0 else left,
            right=None if right < 0 else right,
            slopes=None if slopes is None else slopes[entry],
            slopes_by_key=by_key,
            dropout_p=p_dropout,
        )

    return ruled


def slopes_of(alibi_slopes: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """The slopes as `[batch, num_heads]`."""
    if alibi_slopes is None:
        return None
    check(alibi_slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
    check_device(alibi_slopes=alibi_slopes)
    check(alibi_slopes.stride(-1) == 1, "ALiBi slopes tensor must have contiguous last dimension")
    check(
        tuple(alibi_slopes.shape) in ((heads,), (batch, heads)),
        "alibi_slopes must have shape (num_heads) or (batch, num_heads)",
    )
    return alibi_slopes.expand(batch, heads)


def rng_state(p_dropout: float, generator: Generator | None) -> Tensor:
    """Seed and offset of this call's dropout, from which the backward pass makes it again; not written without it."""
    if p_dropout == 0:
        return torch.full((2,), -1, dtype=torch.int64)
    return torch.cat([torch.randint(2**31, (1,), generator=generator), torch.zeros(1, dtype=torch.int64)])


def kept_of(state: Tensor | None, entry: int, shape: tuple[int, ...], p_dropout: float) -> Tensor | None:
    """What dropout leaves of one sequence's weights. The kernels draw bytes, so p is a multiple of 1/256 there."""
    if p_dropout == 0:
        return None
    check(state is not None, "dropout in the backward pass needs the rng_state of the forward pass")
    generator = torch.Generator().manual_seed(int(state[0]) * 1000 + entry)
    return torch.randint(256, shape, generator=generator) <= math.floor((1 - p_dropout) * 255)


def room_for_weights(
    wanted: bool, p_dropout: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dtype: torch.dtype
) -> Tensor:
    """S_dmask, `[batch, num_heads, seqlen_q, seqlen_k]` in full tiles, or nothing."""
    if not wanted:
        return torch.empty(0, dtype=dtype)
    check(p_dropout > 0, "return_softmax is only supported when p_dropout > 0.0")
    return garbage(batch, heads, rounded_up(seqlen_q), rounded_up(seqlen_k), dtype=dtype)


def mark(marked: Tensor, entry: int, weights: Tensor, kept: Tensor | None) -> None:
    """Writes one sequence's weights into S_dmask: negative where dropout took them. Their scale says nothing."""
    if marked.numel() and kept is not None:
        signed = torch.where(kept, weights, -weights)
        marked[entry, :, : signed.shape[1], : signed.shape[2]] = signed


def rounded_up(seqlen: int) -> int:
    return -(-seqlen // 128) * 128


def padded(x: Tensor) -> Tensor:
    """With a head_dim that is a multiple of 8."""
    return pad(x, (0, -x.shape[-1] % 8))
