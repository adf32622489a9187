"""The door: every call is checked here once, and becomes a Problem. Behind it, nothing is checked again.

torch's kernels are called by bindings that validate nothing: an empty length kills the process, a batch that does not
match is read out of bounds. So whatever cannot be a legal problem is an error here, in the caller's words.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .bias import AttnBias, as_bias
from .errors import InputError, InputTypeError
from .problem import Problem
from .tracing import constant, is_traced

HEADS_LAST = 2
HEADS_FIRST = 1

#: Floats up to it are finite; so are ints beyond it, which no float holds.
LARGEST = sys.float_info.max

#: Tensor classes that mean what a plain tensor means; the others may mean anything.
_PLAIN = frozenset(
    {
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.functional_tensor.FunctionalTensor",
    }
)


def examine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: object,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    heads: int,
) -> tuple[Problem, AttnBias | None]:
    """The problem that these arguments ask, and their bias, bound and normalized.

    Operands have four dimensions, the heads at dimension `heads`. Raises InputError or InputTypeError.
    """
    check_tensors(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        reason = foreign(tensor)
        if reason is not None:
            raise InputTypeError(f"{name}: attention takes plain tensors, got {reason}")
        check_rank(name, tensor, heads)
        if not tensor.is_floating_point():
            raise InputTypeError(f"{name}: must be floating, got {tensor.dtype}")
    _check_agreement(query, key, value)
    bound = as_bias(bias)
    problem_shape = _check_shapes(query, key, value, bound, heads)
    batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, head_dim_v = problem_shape
    scale = check_scale(scale, head_dim)
    check_softcap(softcap)
    check_dropout(dropout_p)
    if bound is not None:
        bound = check_bias(bound, batch, num_heads, seqlen_q, seqlen_kv, query.device)
        if bound is not None and bound.paged is not None:
            bound.paged.check_pages(key.shape[0])
        if bound is not None and not is_traced():
            bound.check_rule()
    grad = torch.is_grad_enabled()
    device = query.device
    problem = Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=query.dtype,
        device=device.type,
        compute_capability=compute_capability(device.index) if device.type == "cuda" else None,
        bias=None if bound is None else bound.without_data(),
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=bool(return_lse),
        requires_grad=grad and (query.requires_grad or key.requires_grad or value.requires_grad),
        bias_requires_grad=grad and bound is not None and bound.requires_grad,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        forward_ad=operator.index(forward_ad._current_level) >= 0,
        compiling=is_traced(),
        strided_head_dim=_strided(query) or _strided(key) or _strided(value),
    )
    return problem, bound


def check_tensors(query: object, key: object, value: object) -> None:
    """Raises InputTypeError for what is no tensor at all."""
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if not isinstance(operand, Tensor):
            raise InputTypeError(f"{name}: takes a tensor, got {type(operand).__name__}")


def check_rank(name: str, tensor: Tensor, heads: int) -> None:
    """Raises InputError for other than four dimensions, the heads at `heads`."""
    if tensor.ndim != 4:
        shape = (
            "[batch, seqlen, num_heads, head_dim]" if heads == HEADS_LAST else "[batch, num_heads, seqlen, head_dim]"
        )
        raise InputError(f"{name}: must be {shape}, got shape {_shape(tensor)}")


def foreign(tensor: Tensor) -> str | None:
    """What kind of tensor this is where the core does not model it; None for a plain one."""
    cls = type(tensor)
    if f"{cls.__module__}.{cls.__qualname__}" not in _PLAIN:
        return f"a {cls.__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    return None


def _check_agreement(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InputTypeError(f"{name}: must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise InputError(f"{name}: must be on query's device {query.device}, got {tensor.device}")


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, heads: int
) -> tuple[int, int, int, int, int, int, int]:
    # Head counts and sizes are plain numbers, also where lengths are symbolic: kernels differ by them.
    num_heads, num_kv_heads = _plain(query.shape[heads]), _plain(key.shape[heads])
    head_dim, head_dim_v = _plain(query.shape[3]), _plain(value.shape[3])
    batch, seqlen_q, seqlen_kv = lengths_of(query, key, value, bias, heads)
    if value.shape[heads] != num_kv_heads:
        raise InputError(f"value: num_heads must be key's {num_kv_heads}, got {value.shape[heads]}")
    if key.shape[3] != head_dim:
        raise InputError(f"key: head_dim must be query's {head_dim}, got {key.shape[3]} (shape {_shape(key)})")
    for name, size in (("query: head_dim", head_dim), ("value: head_dim", head_dim_v), ("query: num_heads", num_heads)):
        if size < 1:
            raise InputError(f"{name} must be at least 1, got {size}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise InputError(
            f"key: num_heads must divide query's num_heads={num_heads} (query head h reads key head"
            f" h // (num_heads // num_kv_heads)), got {num_kv_heads}"
        )
    return batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, head_dim_v


def lengths_of(query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, heads: int) -> tuple[int, int, int]:
    """(batch, seqlen_q, seqlen_kv), on which the operands agree; the bias knows how many keys lie in pages."""
    seq = 3 - heads
    batch, seqlen_q, seqlen_kv = query.shape[0], query.shape[seq], key.shape[seq]
    pages = None if bias is None else bias.paged
    if pages is not None:
        if seqlen_kv != pages.page_size:
            raise InputError(
                f"key: page_size must be the bias's {pages.page_size}, got {seqlen_kv} (shape {_shape(key)}; with"
                " Paged, key is [num_pages, page_size, num_kv_heads, head_dim])"
            )
        for name, got, want in zip(("num_pages", "page_size"), value.shape, key.shape[:2]):
            if got != want:
                raise InputError(f"value: {name} must be key's {want}, got {got} (shape {_shape(value)})")
        if pages.page_table.shape[0] != batch:
            raise InputError(f"bias: page_table must have query's batch={batch}, got {pages.page_table.shape[0]} rows")
        return batch, seqlen_q, pages.seqlen_kv
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise InputError(f"{name}: batch must be query's {batch}, got {tensor.shape[0]} (shape {_shape(tensor)})")
    if value.shape[seq] != seqlen_kv:
        raise InputError(f"value: seqlen must be key's {seqlen_kv}, got {value.shape[seq]} (shape {_shape(value)})")
    return batch, seqlen_q, seqlen_kv


def refuse_pages(bias: AttnBias | None) -> None:
    """Raises InputError where operands are heads-first, and the bias has its keys in pages."""
    if bias is not None and bias.paged is not None:
        raise InputError(
            "attn_mask: with Paged, key and value are pages [num_pages, page_size, num_kv_heads, head_dim]; call"
            " attention, which is heads-last (scaled_dot_product_attention takes no pages)"
        )


def check_scale(scale: Any, head_dim: int) -> Any:
    if scale is None:
        return float(head_dim**-0.5)  # of the unpadded head_dim
    if isinstance(scale, (torch.SymFloat, torch.SymInt)):
        return scale
    if isinstance(scale, Tensor) or not isinstance(scale, (int, float)):
        raise InputTypeError(f"scale: takes a number or None, got {type(scale).__name__}")
    if not abs(scale) <= LARGEST:  # NaN is not
        raise InputError(f"scale: must be finite, got {_told(scale)}")
    return float(scale)


def check_softcap(softcap: Any) -> None:
    if softcap is None:
        return
    if isinstance(softcap, Tensor) or not isinstance(softcap, (int, float)):
        raise InputTypeError(f"softcap: takes a number or None, got {type(softcap).__name__}")
    if not 0 < softcap <= LARGEST:
        raise InputError(f"softcap: must be finite and above 0 (None for none), got {_told(softcap)}")


def check_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, Tensor) or not isinstance(dropout_p, (int, float)):
        raise InputTypeError(f"dropout_p: takes a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p: must lie in [0, 1), got {_told(dropout_p)}")


def _told(number: float) -> str:
    """A number for people: of the digits of an int that no float holds, Python refuses to write too many."""
    if isinstance(number, int) and abs(number) > LARGEST:
        return f"an int of {number.bit_length()} bits, which no float holds"
    return str(number)


def check_bias(
    bias: AttnBias, batch: int, num_heads: int, seqlen_q: int, seqlen_kv: int, device: torch.device
) -> AttnBias | None:
    bias_batch, bias_heads = bias.batch_and_heads
    if bias_batch != 1 and bias_batch != batch:
        raise InputError(f"bias: {bias!r} was made for batch={bias_batch}, got batch={batch}")
    if bias_heads != 1 and bias_heads != num_heads:
        raise InputError(f"bias: {bias!r} was made for num_heads={bias_heads}, got num_heads={num_heads}")
    if bias.device is not None and bias.device != device:
        raise InputError(f"bias: must be on query's device {device}, got {bias.device}")
    return bias.bind(seqlen_q, seqlen_kv).normalize()


def _strided(tensor: Tensor) -> bool:
    return bool(tensor.shape[3] != 1 and tensor.stride(3) != 1)


def _plain(size: Any) -> int:
    return operator.index(size)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


@constant
def compute_capability(index: int | None) -> tuple[int, int] | None:
    """Of a CUDA device; None where this machine has none to ask (a fake tensor's device need not exist)."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)
