"""From the derivative by the logits to that by the tensors of a bias.

The kernel sums over the batch entries and heads that share a bias. What is left, over queries and keys, is plain sums
of torch, in a fixed order; a table gathers in a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .translate import Bias


def bias_sizes(bias: Bias, trained: Sequence[bool]) -> list[int]:
    """[batch, num_heads] of the derivative by the logits: those for which trained tensors have entries, else 1."""
    batches, heads = [1], [1]
    for kind, place, _ in _scores(bias):
        if trained[place]:
            tensor = bias.tensors[place]
            batches.append(1 if kind.startswith("Table<") else tensor.shape[0])
            heads.append(tensor.shape[0] if kind.startswith("Table<") else tensor.shape[1])
    return [next((n for n in sizes if n != 1), 1) for sizes in (batches, heads)]


def gradients_of_tensors(bias: Bias, trained: Sequence[bool], grad_logits: Tensor) -> list[Tensor | None]:
    """One for each tensor; None where it is not trained. `grad_logits`: `[*bias_sizes, seqlen_q, seqlen_kv]`."""
    found: list[Tensor | None] = [None] * len(bias.tensors)
    for kind, place, numbers in _scores(bias):
        if trained[place]:
            tensor = bias.tensors[place]
            found[place] = _gradient(kind, tensor, numbers, grad_logits).to(tensor.dtype)
    return found


def _gradient(kind: str, tensor: Tensor, numbers: Sequence[int], grad_logits: Tensor) -> Tensor:
    if kind.startswith("Added<"):
        return grad_logits.sum_to_size(tensor.shape)
    if kind.startswith("Slopes<"):
        seqlen_q, seqlen_kv = grad_logits.shape[2:]
        q = torch.arange(seqlen_q, device=grad_logits.device)[:, None]
        distance = (torch.arange(seqlen_kv, device=grad_logits.device) - (q + numbers[0])).abs()
        return -(grad_logits * distance).sum((2, 3)).sum_to_size(tensor.shape)
    of_heads = grad_logits.sum_to_size((1, tensor.shape[0], *grad_logits.shape[2:]))[0]
    gathered: Tensor = torch.ops.attn_cuda_ref.simple_table_gradient(of_heads, kind, tensor.shape)
    return gathered


def _scores(bias: Bias) -> Iterator[tuple[str, int, list[int]]]:
    """(type, the place of its tensor, its numbers) of each score."""
    place = sum(bias.mask_fields.count(code) for code in "ts")
    number = bias.mask_fields.count("n")
    for kind, fields in zip(bias.scores, bias.score_fields):
        count = fields.count("n")
        yield kind, place, bias.numbers[number : number + count]
        place, number = place + 1, number + count
