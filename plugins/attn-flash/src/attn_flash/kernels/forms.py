"""How the functions of all generations are told windows and lengths, and what comes back of them."""

from __future__ import annotations

from typing import Any

from attn_core.torch_kernels.packed import Packed, lse_of_entries, normalized


def window_of(left: int | None, right: int | None, told: Packed | None) -> tuple[int, int]:
    """Keys before and behind the diagonal, -1 for all; a causal mask has a flag of its own."""
    if left is None and right == 0:
        return -1, -1
    if told is not None:
        return told.window
    return -1 if left is None else left, -1 if right is None else right


def lengths_of(told: Packed) -> dict[str, Any]:
    """What the function for packed sequences is told of them, by its names."""
    return {
        "cu_seqlens_q": told.starts_q,
        "cu_seqlens_k": told.starts_kv,
        "max_seqlen_q": told.max_q,
        "max_seqlen_k": told.max_kv,
    }


def of_dense(result: Any, return_lse: bool) -> Any:
    """The output, which comes alone or with more; with the LSE where it is asked for."""
    if return_lse:
        return result[0], normalized(result[1])
    return result[0] if isinstance(result, tuple) else result


def of_packed(result: Any, batch: int, return_lse: bool) -> Any:
    """The same of packed sequences: `[tokens, num_heads, head_dim]` and `[num_heads, tokens]`."""
    out = (result[0] if isinstance(result, tuple) else result).unflatten(0, (batch, -1))
    return (out, normalized(lse_of_entries(result[1], batch))) if return_lse else out
