"""A double of NATTEN 0.21 in plain torch: its public functions, by their definition, on any device.

The tests copy this folder to where `import natten` finds it. The signatures are those of the real one, and are compared
where that is installed. The windows are written out as they are defined, one query at a time.
"""

from __future__ import annotations

import itertools
import math

import torch

from . import backends

__version__ = "0.21.7"
HAS_LIBNATTEN = True

#: (function, backend, options) of every call, in order.
calls = []


def na1d(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    additional_keys=None,
    additional_values=None,
    attention_kwargs=None,
    backend=None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    assert query.dim() == 4
    return _neighborhood(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, backend, attention_kwargs, return_lse
    )


def na2d(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    additional_keys=None,
    additional_values=None,
    attention_kwargs=None,
    backend=None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    assert query.dim() == 5
    return _neighborhood(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, backend, attention_kwargs, return_lse
    )


def na3d(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    additional_keys=None,
    additional_values=None,
    attention_kwargs=None,
    backend=None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    assert query.dim() == 6
    return _neighborhood(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, backend, attention_kwargs, return_lse
    )


def attention(
    query,
    key,
    value,
    is_causal=False,
    scale=None,
    seqlens_Q=None,  # noqa: N803
    seqlens_KV=None,  # noqa: N803
    cumulative_seqlen_Q=None,  # noqa: N803
    cumulative_seqlen_KV=None,  # noqa: N803
    max_seqlen_Q=None,  # noqa: N803
    max_seqlen_KV=None,  # noqa: N803
    backend=None,
    q_tile_size=None,
    kv_tile_size=None,
    backward_q_tile_size=None,
    backward_kv_tile_size=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
):
    _note("attention", backend, {"is_causal": is_causal, "varlen": cumulative_seqlen_Q is not None})
    seqlen_q, seqlen_kv = query.shape[1], key.shape[1]
    q, k = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_kv)
    first_q, first_k = torch.zeros_like(q), torch.zeros_like(k)
    mask = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool)
    if cumulative_seqlen_Q is not None:
        of_q, of_kv = cumulative_seqlen_Q.tolist(), cumulative_seqlen_KV.tolist()
        assert cumulative_seqlen_Q.dtype is cumulative_seqlen_KV.dtype is torch.int32
        assert query.shape[0] == 1
        assert (of_q[-1], of_kv[-1]) == (seqlen_q, seqlen_kv)
        assert max_seqlen_Q == max(end - start for start, end in itertools.pairwise(of_q))
        assert max_seqlen_KV == max(end - start for start, end in itertools.pairwise(of_kv))
        mask[:] = False
        for q0, q1, k0, k1 in zip(of_q, of_q[1:], of_kv, of_kv[1:]):
            mask[q0:q1, k0:k1] = True
            first_q[q0:q1], first_k[k0:k1] = q0, k0
    if is_causal:  # from the top left, of each sequence
        mask &= (k - first_k) <= (q - first_q)
    return _softmax(query, key, value, mask, scale, return_lse)


def _neighborhood(
    query, key, value, kernel_size, stride, dilation, is_causal, scale, backend, attention_kwargs, return_lse
):
    rank = query.dim() - 3
    extents = tuple(query.shape[1:-2])
    axes = list(zip(extents, kernel_size, stride, dilation, is_causal))
    assert len(axes) == len(kernel_size) == len(stride) == len(dilation) == len(is_causal) == rank
    for extent, kernel, step, distance, causal in axes:
        if kernel < 2 or kernel * distance > extent or not 1 <= step <= kernel or type(causal) is not bool:
            raise ValueError(f"no window: {(extent, kernel, step, distance, causal)}")
    flat = [tensor.flatten(1, rank) for tensor in (query, key, value)]
    if (rank == 1 or not any(is_causal)) and extents == tuple(kernel_size):
        out, lse = attention(*flat, is_causal=is_causal[0], scale=scale, return_lse=True, **(attention_kwargs or {}))
    else:
        _note(f"na{rank}d", backend, {"axes": axes})
        mask = torch.ones(1, 1, dtype=torch.int32)
        for axis in axes:
            mask = torch.kron(mask, torch.tensor(_seen(*axis), dtype=torch.int32))
        mask = mask.bool()
        out, lse = _softmax(*flat, mask, scale, True)
    out, lse = out.unflatten(1, extents), lse.unflatten(1, extents)
    return (out, lse) if return_lse else out


def _note(function, backend, options):
    if not torch.compiler.is_compiling():
        calls.append((function, backend, options))


def _seen(extent, kernel, stride, dilation, causal):
    """A row for each query of one axis: 1 for the keys that it sees."""
    rows = []
    for i in range(extent):
        line, place = range(i % dilation, extent, dilation), i // dilation
        group = place // stride * stride
        if causal:
            leader = min(group + stride - 1, len(line) - 1)
            first, end = max(leader - kernel + 1, 0), place + 1
        else:
            leader = min(group + stride // 2, len(line) - 1)
            first = min(max(leader - kernel // 2, 0), len(line) - kernel)
            end = first + kernel
        rows.append([int(j in line[first:end]) for j in range(extent)])
    return rows


_seen._dynamo_marked_constant = True  # a graph holds what it gives


def _softmax(query, key, value, mask, scale, return_lse):
    """Heads-last in and out, the LSE too, which is float32."""
    scale = scale or query.shape[-1] ** -0.5
    group = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(group, 2).float() for tensor in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query.float(), key) * scale
    logits = logits.masked_fill(~mask.to(logits.device), -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value).to(query.dtype)
    return (out, logits.logsumexp(-1).transpose(1, 2)) if return_lse else out


__all__ = ["HAS_LIBNATTEN", "__version__", "attention", "backends", "na1d", "na2d", "na3d"]
