"""Adaptations: rewrites that keep the meaning and let a kernel take a problem that it would refuse as it is.

Each answers one refused field. It states how the problem looks to the kernel afterwards, what it costs, and what is
done to the operands; it is shown by `explain` and counted in the estimate.

Operands are handled in the kernel's own layout: heads at dimension `heads` (1 or 2), sequence at the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bias import AttnBias, Mask, TensorBias
from .capabilities import Capabilities, covers, takes_dense_mask
from .cost import Terms
from .problem import Problem
from .rates import Rates, shipped_rates
from .written import is_kept, written_out


@dataclass(frozen=True)
class Operands:
    """What is handed to a kernel, while adaptations rewrite it."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: AttnBias | None


@dataclass(frozen=True)
class Adaptation:
    """One rewrite.

    `rewrite` gives the problem as the kernel sees it, or None where this does not help; `elements` how many elements
    are copied, as coefficients of the lengths; `apply` does it, given the problem before and after.
    """

    name: str
    fields: frozenset[str]
    rewrite: Callable[[Problem, Capabilities], Problem | None]
    elements: Callable[[Problem, Problem], Terms]
    apply: Callable[[Operands, Problem, Problem, int], Operands]

    def terms(self, before: Problem, after: Problem, rates: Rates | None = None) -> Terms:
        """Seconds that it adds, as coefficients of the lengths, at these rates of the device."""
        rates = rates or shipped_rates(before.device)
        elements = self.elements(before, after)
        if self.name == "materialize":
            assert before.bias is not None
            assert isinstance(after.bias, TensorBias)
            kept = not before.compiling and is_kept(before.bias, after.bias.tensor.dtype)  # as are the tables of others
            work = Terms(call=rates.call) if kept else rates.writing(before.bias, elements)
            differentiated = before.bias_requires_grad
        else:
            work, differentiated = rates.copying(elements), before.requires_grad
        return work.times(2.0) if differentiated else work


# gather_pages: keys and values are taken from their pages and laid in a row, each sequence for itself


def _gathered(problem: Problem, capabilities: Capabilities) -> Problem | None:
    bias = problem.bias
    return replace(problem, bias=bias.gathered().normalize()) if bias is not None and problem.in_pages else None


def _apply_gather(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    assert x.bias is not None
    pages = x.bias.paged
    assert pages is not None
    key, value = x.key, x.value
    if heads == 1:  # gathered as the pages lie, heads last, so that each page is one copy
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    key, value = pages.gather(key, value)
    if heads == 1:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    return replace(x, key=key, value=value, bias=x.bias.gathered().normalize())


# expand_kv: every query head gets a key head of its own


def _expand(problem: Problem, capabilities: Capabilities) -> Problem | None:
    if problem.in_pages:  # a pool is not copied as a whole: it holds the pages of others, too
        return None
    return replace(problem, num_kv_heads=problem.num_heads)


def _expanded_elements(before: Problem, after: Problem) -> Terms:
    return Terms(keys=float(after.num_heads * (before.head_dim + before.head_dim_v)))


def _apply_expand(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    group = before.num_heads // before.num_kv_heads
    # Neighbouring query heads share a key head: repeat_interleave, not repeat.
    return replace(x, key=x.key.repeat_interleave(group, heads), value=x.value.repeat_interleave(group, heads))


# pad_head_dim: zeros behind head_dim change neither logits nor the first columns of the result


def _next_size(sizes: Collection[int], least: int) -> int | None:
    """The smallest of `sizes` that is worth padding to; there may be too many to look at each."""
    return next((size for size in range(least, 2 * least + 9) if size in sizes), None)


def _padded(problem: Problem, capabilities: Capabilities) -> Problem | None:
    if problem.in_pages:
        return None
    free_v = capabilities.head_dims_v
    least = problem.head_dim if free_v is not None else max(problem.head_dim, problem.head_dim_v)
    size = _next_size(capabilities.head_dims, least)
    size_v = size if free_v is None else _next_size(free_v, problem.head_dim_v)
    if size is None or size_v is None:
        return None
    return replace(problem, head_dim=size, head_dim_v=size_v)


def _padded_elements(before: Problem, after: Problem) -> Terms:
    dims = float(after.head_dim + after.head_dim_v)
    return Terms(queries=before.num_heads * dims, keys=before.num_kv_heads * dims)


def _apply_pad(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    dim, dim_v = after.head_dim - before.head_dim, after.head_dim_v - before.head_dim_v
    query, key = (pad(x.query, (0, dim)), pad(x.key, (0, dim))) if dim else (x.query, x.key)
    return replace(x, query=query, key=key, value=pad(x.value, (0, dim_v)) if dim_v else x.value)


# contiguous: copies operands whose last dimension is strided


def _contiguous(problem: Problem, capabilities: Capabilities) -> Problem | None:
    return replace(problem, strided_head_dim=False)


def _all_elements(before: Problem, after: Problem) -> Terms:
    dims = before.head_dim + before.head_dim_v
    return Terms(queries=float(before.num_heads * before.head_dim), keys=float(before.num_kv_heads * dims))


def _apply_contiguous(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    return replace(x, query=_with_unit_stride(x.query), key=_with_unit_stride(x.key), value=_with_unit_stride(x.value))


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# zero_padding: what lies behind the lengths is replaced by zeros, for kernels that only mask it (NaN + -inf is NaN);
# the bias has no padding any more then, and is as any other of its rule


def _zeroed(problem: Problem, capabilities: Capabilities) -> Problem | None:
    bias = problem.bias
    if bias is None or not bias.has_padding or problem.in_pages:
        return None
    zeroed = bias.without_padding()
    helps = takes_dense_mask(capabilities) or covers(capabilities.biases, zeroed)
    return replace(problem, bias=zeroed) if helps else None


def _kv_elements(before: Problem, after: Problem) -> Terms:
    return Terms(keys=float(before.num_kv_heads * (before.head_dim + before.head_dim_v)))


def _apply_zero(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    assert x.bias is not None
    valid = x.bias.valid_keys(x.key.device)
    if valid is None:
        return x
    valid = valid[:, :, None, None] if heads == 2 else valid[:, None, :, None]
    key, value = torch.where(valid, x.key, 0), torch.where(valid, x.value, 0)
    return replace(x, key=key, value=value, bias=x.bias.without_padding())


# materialize: a bias is written out as a tensor


def _materialized(problem: Problem, capabilities: Capabilities) -> Problem | None:
    bias = problem.bias
    if bias is None or isinstance(bias, TensorBias) or not bias.has_dense_form or not takes_dense_mask(capabilities):
        return None
    dtype = torch.bool if isinstance(bias, Mask) else _dense_dtype(problem.dtype)
    shape = (*bias.batch_and_heads, problem.seqlen_q, problem.seqlen_kv)
    dense = torch.empty(shape, dtype=dtype, device="meta", requires_grad=bias.requires_grad)
    return replace(problem, bias=TensorBias(dense, bias.lengths))


def _dense_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers are written out in: wider than half precision, in which a distance of 257 keys is not a number."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _dense_elements(before: Problem, after: Problem) -> Terms:
    assert before.bias is not None
    batch, num_heads = before.bias.batch_and_heads
    return Terms(dense=float(num_heads)) if batch == 1 else Terms(pairs=float(num_heads))


def _apply_materialize(x: Operands, before: Problem, after: Problem, heads: int) -> Operands:
    assert x.bias is not None
    dense = written_out(x.bias, x.query.device, _dense_dtype(x.query.dtype))
    return replace(x, bias=TensorBias(dense, x.bias.lengths))


GATHER_PAGES = Adaptation(
    "gather_pages", frozenset({"bias", "backward.biases"}), _gathered, _kv_elements, _apply_gather
)
EXPAND_KV = Adaptation(
    "expand_kv", frozenset({"num_kv_heads", "backward.gqa"}), _expand, _expanded_elements, _apply_expand
)
PAD_HEAD_DIM = Adaptation("pad_head_dim", frozenset({"head_dim", "head_dim_v"}), _padded, _padded_elements, _apply_pad)
CONTIGUOUS = Adaptation("contiguous", frozenset({"strided_head_dim"}), _contiguous, _all_elements, _apply_contiguous)
ZERO_PADDING = Adaptation("zero_padding", frozenset({"bias", "backward.biases"}), _zeroed, _kv_elements, _apply_zero)
MATERIALIZE = Adaptation(
    "materialize", frozenset({"bias", "backward.biases"}), _materialized, _dense_elements, _apply_materialize
)

#: In the order in which they are tried and applied: no pool of pages is copied as a whole, and padding is zeroed before
#: the bias that knows it is gone.
ADAPTATIONS = (GATHER_PAGES, CONTIGUOUS, EXPAND_KV, PAD_HEAD_DIM, ZERO_PADDING, MATERIALIZE)
