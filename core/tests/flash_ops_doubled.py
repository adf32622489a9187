"""A double, on the CPU and in plain torch, of the two ops behind torch's FlashAttention, and our kernels over it.

It follows `flash_api.cpp` of torch 2.13, with what is odd in it: limits of a window that count as none, ALiBi added by
keys alone in the causal form, an LSE of +inf where a query sees no key, heads folded into queries where `max_q` is 1, a
backward that knows neither ALiBi nor used lengths. What the op would not write is NaN here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import attn_core
import torch
from attn_core import Kernel
from attn_core.registry import registry
from attn_core.torch_kernels import fa_window, flash_limits, varlen
from torch import Tensor

#: Those that this torch has.
KERNELS = {fa_window.KERNEL.name: fa_window.KERNEL}
if flash_limits.arguments_of_the_op() >= varlen.NEEDED and find_spec(varlen.MODULE):
    KERNELS[varlen.KERNEL.name] = varlen.KERNEL
NAN = float("nan")


@dataclass
class Called:
    """What the double was last asked, so that a test can see which form a call took."""

    forward: dict[str, object] | None = None
    backward: dict[str, object] | None = None


@contextmanager
def doubled() -> Iterator[Called]:
    """Within it, the ops have an implementation for the CPU."""
    called = Called()

    def forward(query, key, value, *rest, **options):
        called.forward = named(FORWARD, rest, options)
        return flash_forward(query, key, value, **called.forward)

    def backward(grad_out, query, key, value, out, logsumexp, *rest, **options):
        called.backward = named(BACKWARD, rest, options)
        return flash_backward(grad_out, query, key, value, out, logsumexp, **called.backward)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield called
    finally:
        library._destroy()


@contextmanager
def registered() -> Iterator[None]:
    """Within it, the kernels are those of the CPU, under their own names."""
    for name in KERNELS:
        registry.unregister(registry.kernel(name))
    handles = [registry.register(on_the_cpu(kernel)) for kernel in KERNELS.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.unregister()
        attn_core.refresh()  # finds those that are installed


def on_the_cpu(kernel: Kernel) -> Kernel:
    """The kernel as it is declared for CUDA, declared for the CPU instead: the double runs there."""
    (declared,) = kernel.declarations
    capabilities = replace(declared, devices={"cpu"}, min_compute_capability=None)
    return replace(kernel, capabilities=capabilities, probe=None, costs={"cpu": kernel.costs["cuda"]})


FORWARD = {
    "cum_seq_q": None,
    "cum_seq_k": None,
    "max_q": None,
    "max_k": None,
    "dropout_p": None,
    "is_causal": None,
    "return_debug_mask": None,
    "scale": None,
    "window_size_left": None,
    "window_size_right": None,
    "seqused_k": None,
    "alibi_slopes": None,
    "block_table": None,
    "num_splits": None,
}
BACKWARD = {
    "cum_seq_q": None,
    "cum_seq_k": None,
    "max_q": None,
    "max_k": None,
    "dropout_p": None,
    "is_causal": None,
    "rng_state": None,
    "unused": None,
    "scale": None,
    "window_size_left": None,
    "window_size_right": None,
}


def named(defaults: dict[str, object], rest: tuple[object, ...], options: dict[str, object]) -> dict[str, object]:
    """The arguments behind the operands, by their names."""
    return defaults | dict(zip(defaults, rest)) | options


def check(condition: bool, said: str) -> None:
    if not condition:
        raise RuntimeError(said)


@dataclass(frozen=True)
class Asked:
    """What one sequence's logits are made with."""

    scale: float
    left: int
    right: int
    slopes: Tensor | None
    dropout_p: float
    seed: int

    @property
    def is_causal(self) -> bool:
        return self.left < 0 and self.right == 0


def limits(
    left: int | None, right: int | None, is_causal: bool, max_q: int, max_k: int, alibi: bool
) -> tuple[int, int]:
    """The window as the op reads it."""
    left, right = -1 if left is None else left, -1 if right is None else right
    if max_q == 1 and not alibi:
        is_causal = False
    if is_causal:
        right = 0
    left, right = -1 if left >= max_k else left, -1 if right >= max_k else right
    if left >= 0 and right < 0:
        right = max_k
    return left, right  # left < 0 beside a right one becomes max_k in the op, which is none


def check_operands(query: Tensor, key: Tensor, value: Tensor, dims: int) -> None:
    for tensor in (query, key, value):
        check(tensor.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
        check(tensor.dtype == query.dtype, "query, key and value must have the same dtype")
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    check(query.ndim == dims, f"query must have {dims} dimensions, got {query.ndim}")
    check(query.shape[-1] % 8 == 0 and query.shape[-1] <= 256, "head_size must be a multiple of 8, at most 256")
    check(query.shape[-1] == key.shape[-1] == value.shape[-1], "one head_size for all")
    check(query.shape[-2] % key.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")


def check_starts(starts: Tensor) -> None:
    check(starts.dtype is torch.int32 and starts.is_contiguous(), "cu_seqlens must have dtype int32, contiguous")


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check((cum_seq_q is None) == (cum_seq_k is None), "cumulative_sequence_length_q and _k must be both set or not")
    check(not return_debug_mask and num_splits is None, "the double was not asked for this before")
    packed = cum_seq_q is not None
    check_operands(query, key, value, 3 if packed else 4)
    if packed:
        check_starts(cum_seq_q)
        check_starts(cum_seq_k)
    else:
        max_q, max_k = query.shape[1], key.shape[1]
        check(seqused_k is None and block_table is None, "lengths and pages are for cu_seqlens")
    batch = cum_seq_q.numel() - 1 if packed else query.shape[0]
    heads = query.shape[-2]
    if alibi_slopes is not None:
        check(alibi_slopes.dtype is torch.float32 and alibi_slopes.stride(-1) == 1, "ALiBi slopes must have dtype fp32")
        check(alibi_slopes.shape in ((heads,), (batch, heads)), "ALiBi slopes are [num_heads] or [batch, num_heads]")
        alibi_slopes = alibi_slopes.expand(batch, heads)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left, right = limits(window_size_left, window_size_right, is_causal, max_q, max_k, alibi_slopes is not None)
    folds = max_q == 1 and heads > key.shape[-2] and left < 0 and right < 0 and not dropout_p and alibi_slopes is None
    seed = int(torch.randint(1 << 30, ())) if dropout_p else 0
    asked = Asked(scale, left, right, alibi_slopes, dropout_p, seed)
    rng_state = torch.tensor([seed, 0], dtype=torch.int64).view(torch.uint64)
    rest = rng_state, torch.empty((), dtype=torch.uint64), torch.empty(0, dtype=query.dtype)
    if not packed:
        out, lse = attended(query, key, value, asked, asked.slopes)
        return out, lse, *rest
    check(
        not folds or query.shape[0] == batch, f"shape '[{batch}, …]' is invalid for input of {query.shape[0]} queries"
    )
    if block_table is not None:
        check(block_table.dtype is torch.int32 and block_table.stride(-1) == 1, "block_table must have dtype int32")
        check(key.ndim == 4 and key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
        check(block_table.shape[0] == batch, "block_table is [batch, max_num_blocks_per_seq]")
    if seqused_k is not None:
        check(seqused_k.dtype is torch.int32 and seqused_k.shape == (batch,), "seqused_k must be int32, [batch]")
    out = torch.full_like(query, NAN)
    lse = torch.full((heads, query.shape[0]), NAN)
    for those in alike(cum_seq_q, cum_seq_k, seqused_k, max_q):
        rows_q, rows_k = those.rows_q, those.rows_k
        keys, values = (taken(tensor, rows_k, those.which, block_table) for tensor in (key, value))
        slopes = None if alibi_slopes is None else alibi_slopes[those.which]
        found, own = attended(query[rows_q], keys, values, asked, slopes, those.which)
        out[rows_q], lse[:, rows_q] = found, own.transpose(0, 1)
    return out, lse, *rest


@dataclass(frozen=True)
class Alike:
    """Sequences of the same lengths."""

    which: Tensor  #: [n]
    rows_q: Tensor  #: [n, seqlen_q]
    rows_k: Tensor  #: [n, seqlen_kv]: rows of the packed keys; in pages, counted from the sequence's first


def alike(starts_q: Tensor, starts_k: Tensor, used: Tensor | None, max_q: int) -> Iterator[Alike]:
    seqlens_q = starts_q.diff().clamp(max=max_q)  # what lies behind max_q is not computed
    seqlens_k = starts_k.diff() if used is None else used
    sizes = torch.stack((seqlens_q, seqlens_k), -1)
    for seqlen_q, seqlen_k in sizes.unique(dim=0).tolist():
        which = ((seqlens_q == seqlen_q) & (seqlens_k == seqlen_k)).nonzero()[:, 0]
        rows_q, rows_k = (
            starts[which].long()[:, None] + torch.arange(seqlen)
            for starts, seqlen in ((starts_q, seqlen_q), (starts_k, seqlen_k))
        )
        yield Alike(which, rows_q, rows_k)


def taken(packed: Tensor, rows: Tensor, which: Tensor, table: Tensor | None) -> Tensor:
    """The keys of some sequences, `[n, seqlen_kv, num_kv_heads, head_dim]`."""
    if table is None:
        return packed[rows]
    size, places = packed.shape[1], torch.arange(rows.shape[1])
    return packed[table[which].long()[:, places // size], places % size]


def logits_of(query: Tensor, key: Tensor, asked: Asked, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits `[n, num_heads, seqlen_q, seqlen_kv]` of float32, which of them count `[seqlen_q, seqlen_kv]`)."""
    group = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(group, 2)
    logits = torch.einsum("nqhd,nkhd->nhqk", query.float(), key.float()) * asked.scale
    row, column = torch.arange(query.shape[1])[:, None], torch.arange(key.shape[1])
    diagonal = row + key.shape[1] - query.shape[1]
    if slopes is not None:
        added = column if asked.is_causal else -(diagonal - column).abs()
        logits = logits + slopes[:, :, None, None] * added
    counts = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
    if asked.left >= 0:
        counts &= column >= diagonal - asked.left
    if asked.right >= 0:
        counts &= column <= diagonal + asked.right
    return logits, counts


def kept_of(weights: Tensor, asked: Asked, which: Tensor | None) -> Tensor:
    """What dropout leaves of weights, as factors; the same for the same seed."""
    if not asked.dropout_p:
        return torch.ones(())
    first = 0 if which is None else int(which[0])
    generator = torch.Generator().manual_seed(asked.seed + first)
    return (torch.rand(weights.shape, generator=generator) >= asked.dropout_p) / (1 - asked.dropout_p)


def attended(
    query: Tensor, key: Tensor, value: Tensor, asked: Asked, slopes: Tensor | None, which: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits, counts = logits_of(query, key, asked, slopes)
    logits = logits.masked_fill(~counts, -math.inf)
    lse = logits.logsumexp(-1) if key.shape[1] else logits.new_full(logits.shape[:3], -math.inf)
    weights = torch.where(lse[..., None] == -math.inf, 0.0, (logits - lse[..., None]).exp())
    weights = weights * kept_of(weights, asked, which)
    group = query.shape[2] // key.shape[2]
    out = torch.einsum("nhqk,nkhd->nqhd", weights, value.float().repeat_interleave(group, 2))
    return out.to(query.dtype), lse.masked_fill(lse == -math.inf, math.inf)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = cum_seq_q is not None
    check_operands(query, key, value, 3 if packed else 4)
    if not packed:
        max_q, max_k = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left, right = limits(window_size_left, window_size_right, is_causal, 0, max_k, True)
    seed = int(rng_state.view(torch.int64)[0]) if dropout_p else 0
    asked = Asked(scale, left, right, None, dropout_p, seed)
    if not packed:
        return gradients(grad_out, query, key, value, out, logsumexp, asked)
    grads = tuple(torch.full_like(tensor, NAN) for tensor in (query, key, value))
    for those in alike(cum_seq_q, cum_seq_k, None, max_q):
        rows_q, rows_k = those.rows_q, those.rows_k
        own = logsumexp[:, rows_q].transpose(0, 1)
        found = gradients(
            grad_out[rows_q], query[rows_q], key[rows_k], value[rows_k], out[rows_q], own, asked, those.which
        )
        for grad, rows, part in zip(grads, (rows_q, rows_k, rows_k), found):
            grad[rows] = part
    return grads


def gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    asked: Asked,
    which: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits, counts = logits_of(query, key, asked, None)
    weights = torch.where(counts, (logits - lse[..., None]).exp(), 0.0)
    kept = kept_of(weights, asked, which)
    group = query.shape[2] // key.shape[2]
    keys, values = (tensor.float().repeat_interleave(group, 2) for tensor in (key, value))
    grad, delta = grad_out.float(), (grad_out.float() * out.float()).sum(-1).transpose(1, 2)
    of_weights = torch.einsum("nqhd,nkhd->nhqk", grad, values) * kept
    of_logits = weights * (of_weights - delta[..., None]) * asked.scale
    dq = torch.einsum("nhqk,nkhd->nqhd", of_logits, keys)
    dk = torch.einsum("nhqk,nqhd->nkhd", of_logits, query.float())
    dv = torch.einsum("nhqk,nqhd->nkhd", weights * kept, grad)
    dk, dv = (tensor.unflatten(2, (key.shape[2], group)).sum(3) for tensor in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)
