"""What the operators themselves say of a problem: `not_supported_reasons`, asked with tensors that have no data.

They ask CUDA for the compute capability of a tensor's device, so only what concerns a GPU of this machine is asked; of
others, the class attributes alone are read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from attn_core import Problem
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import library
from . import forms
from .operands import ALIGNED, Sent, beside_causal
from .operators import Pair


class StandIn(Tensor):
    """A tensor that has everything but data, on a device that need not be there."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] | None = None
    ) -> StandIn:
        options: dict[str, Any] = {} if strides is None else {"strides": strides}
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, **options)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Shapes and strides of the result."""
        devices: list[torch.device] = []

        def to_meta(x: Any) -> Any:
            if not isinstance(x, StandIn):
                return x
            devices.append(x.device)
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

        result = op(*tree_map(to_meta, args), **tree_map(to_meta, kwargs or {}))
        return tree_map(
            lambda x: cls(tuple(x.size()), x.dtype, devices[0], x.stride()) if isinstance(x, Tensor) else x, result
        )


def stand_ins(problem: Problem, form: forms.Form, device: torch.device) -> Sent:
    """What `operands.sent` makes of contiguous operands, in shapes, strides, dtypes. Raises what `form.made` does."""
    p = problem
    batch, entries = (1, p.batch) if form.packed else (p.batch, 1)
    seqlen_q, seqlen_kv = entries * p.seqlen_q, entries * p.seqlen_kv
    group = p.num_heads // p.num_kv_heads

    def of(seqlen: int, heads: int, dim: int) -> StandIn:
        if p.num_heads == p.num_kv_heads:
            return StandIn((batch, seqlen, heads, dim), p.dtype, device)
        along_group = dim if heads == p.num_heads else 0
        strides = (seqlen * heads * dim, heads * dim, group * dim if along_group else dim, along_group, 1)
        return StandIn((batch, seqlen, p.num_kv_heads, group, dim), p.dtype, device, strides)

    query = of(seqlen_q, p.num_heads, p.head_dim)
    key, value = of(seqlen_kv, p.num_kv_heads, p.head_dim), of(seqlen_kv, p.num_kv_heads, p.head_dim_v)
    query.requires_grad_(p.requires_grad)
    if form.tensor is None:
        attn_bias = on(device, form.made(torch.device("cpu")))
    else:
        tensor = _tensor(problem, form.tensor.tensor)
        attn_bias = tensor if form.kind == forms.TENSOR else beside_causal(tensor)
    return Sent(query, key, value, attn_bias)


def _tensor(p: Problem, given: Tensor) -> Tensor:
    """Of exactly the class that operators list, which is compared; of its device they ask nothing."""
    shape = (p.batch, p.num_heads, p.seqlen_q, p.seqlen_kv)
    sizes = (1,) * (4 - given.ndim) + tuple(given.shape)
    row = -(-p.seqlen_kv // ALIGNED) * ALIGNED
    full = (sizes[1] * sizes[2] * row, sizes[2] * row, row)
    strides = (*(stride if size != 1 or want == 1 else 0 for stride, size, want in zip(full, sizes, shape)), 1)
    if p.num_heads != p.num_kv_heads:
        group = p.num_heads // p.num_kv_heads
        shape = (shape[0], p.num_kv_heads, group, *shape[2:])  # type: ignore[assignment]
        strides = (strides[0], strides[1] * group, *strides[1:])
    tensor = torch.empty_strided(shape, strides, dtype=p.dtype, device="meta")
    return tensor.requires_grad_(p.bias_requires_grad)


def on(device: torch.device, attn_bias: Any) -> Any:
    """The bias object, whose tensors seem to lie on `device`."""

    def there(info: Any) -> Any:
        tensors = {name: each for name, each in vars(info).items() if isinstance(each, Tensor)}
        return replace(info, **{name: StandIn(tuple(x.shape), x.dtype, device) for name, x in tensors.items()})

    if device.type == "cpu" or not hasattr(attn_bias, "q_seqinfo"):
        return attn_bias
    return replace(attn_bias, q_seqinfo=there(attn_bias.q_seqinfo), k_seqinfo=there(attn_bias.k_seqinfo))


def reasons(operator: Any, sent: Sent, dropout_p: float, scale: float | None) -> list[str]:
    """What this operator, a forward or a backward one, has against these operands."""
    inputs = library.XFORMERS.module().Inputs(
        query=sent.query, key=sent.key, value=sent.value, attn_bias=sent.attn_bias, p=dropout_p, scale=scale
    )
    return list(operator.not_supported_reasons(inputs))


def device_of(device: str, capability: tuple[int, int] | None) -> torch.device | None:
    """A device of this machine of that type and compute capability; None where there is none."""
    if device != "cuda":
        return torch.device(device)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if capability is None or torch.cuda.get_device_capability(index) == capability:
                return torch.device("cuda", index)
    return None


def scale_of(problem_scale: float, head_dim: int) -> float | None:
    """The scale as an operator is given it: None for its own default, which some take alone."""
    return None if problem_scale == float(head_dim**-0.5) else problem_scale


def allowed(pair: Pair, form: forms.Form, training: bool) -> bool:
    """Whether the operators list this class among those that they take."""
    if form.kind == forms.NO_BIAS and pair.manners.needs_lengths:
        return False
    if not _lists(pair.forward, form.kind) or (form.instead_of_tensor and _lists(pair.forward, forms.TENSOR)):
        return False
    return not training or (pair.backward is not None and _lists(pair.backward, form.kind))


def _lists(operator: Any, kind: str) -> bool:
    return any(each.__name__ == kind for each in operator.SUPPORTED_ATTN_BIAS_TYPES)
