"""attention(): plain attention by NATTEN's signature, over any kernel; packed sequences too."""

from __future__ import annotations

import itertools
from typing import Any

import attn_core
from attn_core import Causal, Segments
from attn_core.errors import InputError, InputTypeError
from torch import Tensor

from .backends import FMHA, kernel_of
from .errors import ConstraintError, UnsupportedError
from .options import NO_OPTIONS_OF_ATTENTION, OF_ATTENTION, given_options, say_options_without_effect

TOP_LEFT = Causal("top-left")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,  # noqa: N803
    seqlens_KV: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_Q: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_KV: Tensor | None = None,  # noqa: N803
    max_seqlen_Q: int | None = None,  # noqa: N803
    max_seqlen_KV: int | None = None,  # noqa: N803
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of every query to every key, by the best kernel that takes the problem.

    Args:
        query: `[batch, seqlen, num_heads, head_dim]`.
        key: `[batch, seqlen_kv, num_kv_heads, head_dim]`; num_kv_heads divides num_heads.
        value: `[batch, seqlen_kv, num_kv_heads, head_dim_v]`.
        is_causal: query i sees the keys up to i, counted from the first of both (the top-left corner).
        scale: default `head_dim ** -0.5`; 0.0 is honoured.
        seqlens_Q, seqlens_KV: varlen: the lengths of sequences that are packed behind each other in a batch of one;
            int32 `[sequences]`, both or none. No sequence sees another.
        cumulative_seqlen_Q, cumulative_seqlen_KV: the same as where each sequence begins and the last one ends; int32
            `[sequences + 1]`, both or none, instead of the lengths.
        max_seqlen_Q, max_seqlen_KV: the longest sequence, or more; checked where given.
        backend: "cutlass-fmha", "hopper-fmha", "blackwell-fmha" or "flex-fmha", the kernels `natten/<backend>`; or the
            name of any kernel of attn; None: the best.
        return_lse: also return the log-sum-exp of the logits.

    The others are as in NATTEN, and without effect here: kernels choose their tiles by themselves.

    Lengths in tensors are read at each call, which waits for their device, and cannot be while a graph is traced: there
    call `attn_core.attention` with `attn_core.Segments`, which is made beforehand.

    Returns:
        `out`, `[batch, seqlen, num_heads, head_dim_v]`; with `return_lse`, `(out, lse)`, lse `[batch, seqlen,
        num_heads]` in float32 (float64 for float64), natural log, and differentiable.

    Raises:
        InputError, InputTypeError, ConstraintError: arguments that do not fit together; each names the argument.
        UnsupportedError: nested tensors.
        UnknownBackendError, KernelRefusedError: `backend` is unknown, not there, or refuses; with its reasons.
    """
    _check(query, key, value)
    if not isinstance(is_causal, bool):
        raise InputError(f"is_causal: takes True or False, got {is_causal!r}")
    bias: Any = TOP_LEFT if is_causal else None
    packed = _packed(
        query,
        (seqlens_Q, seqlens_KV),
        (cumulative_seqlen_Q, cumulative_seqlen_KV),
        (max_seqlen_Q, max_seqlen_KV),
    )
    if packed is not None:
        bias = Segments(*packed, within=bias)
    options = (
        q_tile_size,
        kv_tile_size,
        backward_q_tile_size,
        backward_kv_tile_size,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    if options != NO_OPTIONS_OF_ATTENTION:
        say_options_without_effect("attention", given_options(1, OF_ATTENTION, options))
    kernel = kernel_of(backend, FMHA)
    if not return_lse:
        return attn_core.attention(query, key, value, bias, scale=scale, kernel=kernel)
    out, lse = attn_core.attention(query, key, value, bias, scale=scale, return_lse=True, kernel=kernel)
    return out, lse.transpose(1, 2)


def _check(query: Any, key: Any, value: Any) -> None:
    """What is said in NATTEN's classes of errors; the core checks the rest."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{name}: takes a tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise UnsupportedError(f"{name}: takes plain tensors, got a nested one")
        if tensor.dtype != query.dtype:
            raise ConstraintError(f"{name}: must have query's dtype {query.dtype}, got {tensor.dtype}")


# Packed sequences

Pair = tuple[Any, Any]


def _packed(query: Tensor, lengths: Pair, offsets: Pair, longest: Pair) -> tuple[list[int], list[int]] | None:
    """(seqlens_q, seqlens_kv) of the sequences; None where there are none."""
    by_lengths, by_offsets = (any(each is not None for each in pair) for pair in (lengths, offsets))
    if by_lengths and by_offsets:
        raise InputError("seqlens_Q, cumulative_seqlen_Q: takes lengths or offsets of the sequences, got both")
    if not by_lengths and not by_offsets:
        if any(longest):  # NATTEN's own answer for what is not packed is 0
            raise InputError(
                f"max_seqlen_Q, max_seqlen_KV: are for packed sequences, beside cumulative_seqlen_Q and"
                f" cumulative_seqlen_KV; got {longest[0]!r} and {longest[1]!r} alone"
            )
        return None
    kind, pair = ("seqlens", lengths) if by_lengths else ("cumulative_seqlen", offsets)
    if query.shape[0] != 1:
        raise ConstraintError(
            f"query: packed sequences lie behind each other in a batch of 1, got batch={query.shape[0]}"
        )
    found = []
    for end, each, most in zip(("Q", "KV"), pair, longest):
        seqlens = _read(f"{kind}_{end}", each, "KV" if end == "Q" else "Q", kind, by_offsets)
        if most is not None:
            _check_longest(f"max_seqlen_{end}", most, seqlens)
        found.append(seqlens)
    if len(found[0]) != len(found[1]):
        raise ConstraintError(
            f"{kind}_KV: must be of as many sequences as {kind}_Q, {len(found[0])}; got {len(found[1])}"
        )
    return found[0], found[1]


def _read(name: str, tensor: Any, other: str, kind: str, offsets: bool) -> list[int]:
    """The lengths that a tensor says."""
    if tensor is None:
        raise InputError(f"{name}: takes a tensor where {kind}_{other} is given, got None")
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name}: takes a tensor of integers, got {type(tensor).__name__}")
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or str(tensor.dtype) == "torch.bool":
        shape = "[sequences + 1]" if offsets else "[sequences]"
        raise ConstraintError(f"{name}: must be integers {shape}, got {tensor.dtype} of shape {list(tensor.shape)}")
    values: list[int] = tensor.tolist()
    if offsets:
        if not values or values[0] != 0:
            raise InputError(f"{name}: begins with 0, where the first sequence does; got {values[:1]}")
        values = [end - start for start, end in itertools.pairwise(values)]
    if not values:
        raise InputError(f"{name}: takes one sequence or more, got none")
    for n, length in enumerate(values):
        if length < 0:
            raise InputError(f"{name}: lengths must be >= 0, got {length} for sequence {n}")
    return values


def _check_longest(name: str, most: Any, seqlens: list[int]) -> None:
    if isinstance(most, bool) or not isinstance(most, int) or most < max(seqlens):
        raise InputError(f"{name}: takes an int that no sequence exceeds, here {max(seqlens)} or more; got {most!r}")
