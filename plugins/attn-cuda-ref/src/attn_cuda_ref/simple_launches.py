"""The launches of cuda-ref/simple: operands in, results out, by whichever launcher runs the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .constants import (
    ROWS,
    THREADS,
    arguments,
    constants,
    forward_bytes,
    gradient_bytes,
    strides,
    walked_backward,
)
from .launcher import Argument, Function, Launcher
from .translate import Bias

BLOCK = (THREADS, 1, 1)


class SimpleLaunches:
    """Those of one kind of device; `launcher_of` gives the launcher of a device of it."""

    def __init__(self, launcher_of: Callable[[torch.device], Launcher]) -> None:
        self._launcher_of = launcher_of
        self._functions: dict[tuple[Any, ...], Function] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse): `[batch, seqlen_q, num_heads, head_dim_v]`, contiguous, and `[batch, num_heads, seqlen_q]`."""
        out, lse = empty_results(query, value)
        batch, seqlen_q, num_heads, head_dim = query.shape
        head_dim_v = value.shape[3]
        function = self._function("simple_forward", query, head_dim_v, bias, softcap)
        operands = [*_operand(query), *_operand(key), *_operand(value), out, lse]
        function.launch(
            (batch * num_heads * _tiles(seqlen_q, ROWS), 1, 1),
            BLOCK,
            forward_bytes(head_dim, head_dim_v),
            [*operands, *_sizes(query, key), *_numbers(scale, softcap), *arguments(bias)],
        )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Bias,
        scale: float,
        softcap: float | None,
        needs: Sequence[bool],
        bias_sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients to query, to key, to value, and to the logits; `empty_gradients` says of which sizes."""
        found = empty_gradients(query, key, value, needs, bias_sizes)
        batch, seqlen_q, num_heads, head_dim = query.shape
        seqlen_kv, num_kv_heads, head_dim_v = key.shape[1], key.shape[2], value.shape[3]
        grad_lse = None if grad_lse is None else grad_lse.contiguous()

        delta = torch.empty_like(lse)
        operands = [*_operand(query), *_operand(key), *_operand(value), *_operand(grad_out), lse]
        rest = [*_numbers(scale, softcap), *arguments(bias)]
        rows = batch * num_heads * _tiles(seqlen_q, ROWS)  # blocks of queries

        def launch(entry: str, blocks: int, weights: int, own: Sequence[Argument]) -> None:
            function = self._function(entry, query, head_dim_v, bias, softcap)
            shared_bytes = gradient_bytes(head_dim, head_dim_v, weights)
            function.launch((blocks, 1, 1), BLOCK, shared_bytes, [*operands, *own, *rest])

        if needs[2] and query.dtype is not torch.float32:
            launch("simple_exact_delta", rows, 0, [grad_lse, delta, *_sizes(query, key)])
        else:
            function = self._function("simple_delta", query, head_dim_v, NO_BIAS, None)
            of_out = [*_operand(grad_out), *_operand(out), grad_lse, delta, num_heads, seqlen_q]
            function.launch((rows, 1, 1), BLOCK, 0, of_out)
        operands.append(delta)

        if needs[1]:
            blocks = batch * num_kv_heads * _tiles(seqlen_kv, ROWS)
            launch("simple_key_value_gradient", blocks, 2, [found[1], found[2], *_sizes(query, key)])
        if needs[0]:
            launch("simple_query_gradient", rows, 1, [found[0], *_sizes(query, key)])
        if needs[2]:
            tiles = _tiles(seqlen_q, ROWS) * _tiles(seqlen_kv, walked_backward(head_dim, head_dim_v))
            own = [found[3], batch, *_sizes(query, key), *bias_sizes]
            launch("simple_bias_gradient", bias_sizes[0] * bias_sizes[1] * tiles, 0, own)
        return found

    def table_gradient(self, grad_logits: Tensor, table: str, sizes: Sequence[int]) -> Tensor:
        """`[num_heads, ...]` of these sizes, float32, from `[num_heads, tokens, tokens]`."""
        found = grad_logits.new_empty(sizes)
        key = ("simple_table_gradient", table, grad_logits.device)
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._compile("simple_table_gradient", grad_logits, {"TABLE": table})
        function.launch((_tiles(found.numel(), THREADS), 1, 1), BLOCK, 0, [grad_logits.contiguous(), found, sizes[0]])
        return found

    def _function(self, entry: str, query: Tensor, head_dim_v: int, bias: Bias, softcap: float | None) -> Function:
        head_dim = query.shape[3]
        # The ranks and dtypes of a bias's tensors follow from its types, but for the ranks of what has strides.
        of_bias = bias.mask, bias.mask_fields, *bias.scores, *bias.score_fields
        key = (entry, query.dtype, query.device, head_dim, head_dim_v, softcap is None, of_bias)
        function = self._functions.get(key)
        if function is None:
            made = constants(query.dtype, head_dim, head_dim_v, bias, softcap is not None)
            function = self._functions[key] = self._compile(entry, query, made)
        return function

    def _compile(self, entry: str, like: Tensor, made: dict[str, Any]) -> Function:
        return self._launcher_of(like.device).compile(f'#include "{entry}.cuh"\n', entry, made)


NO_BIAS = Bias("Everything", "", [], [], [], [])


def empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, num_heads, _ = query.shape
    out = query.new_empty(batch, seqlen_q, num_heads, value.shape[3])
    return out, query.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, needs: Sequence[bool], bias_sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous, of the sizes of query, key and value, and float32 `[*bias_sizes, seqlen_q, seqlen_kv]`; what is not
    needed is empty."""
    of_query, of_key_and_value, of_bias = needs
    nothing = (0,)
    return (
        query.new_empty(query.shape if of_query else nothing),
        key.new_empty(key.shape if of_key_and_value else nothing),
        value.new_empty(value.shape if of_key_and_value else nothing),
        query.new_empty((*bias_sizes, query.shape[1], key.shape[1]) if of_bias else nothing, dtype=torch.float32),
    )


def _operand(tensor: Tensor) -> list[Argument]:
    return [tensor, *strides(tensor)]


def _sizes(query: Tensor, key: Tensor) -> list[Argument]:
    _, seqlen_q, num_heads, _ = query.shape
    return [num_heads, num_heads // key.shape[2], seqlen_q, key.shape[1]]


def _numbers(scale: float, softcap: float | None) -> list[Argument]:
    return [float(scale), 0.0 if softcap is None else float(softcap)]


def _tiles(count: int, size: int) -> int:
    return -(-count // size)
