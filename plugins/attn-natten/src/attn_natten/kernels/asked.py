"""NATTEN's own word on a problem: its predicates `can_run_*`, asked with tensors that have no data.

What is declared says what NATTEN 0.21 can do at its best; an older release can do less, and says so here. The
predicates ask CUDA about the device of a tensor, so only what concerns a GPU of this machine is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from attn_core import Problem, Refusal
from attn_core.tracing import constant
from torch import Tensor

from .. import library

#: Tokens on each axis of the tensors that are shown to a predicate: none depends on the number.
TOKENS = 4

#: (num_heads, num_kv_heads, head_dim, head_dim_v, dtype, needs a backward)
Facts = tuple[int, int, int, int, torch.dtype, bool]


class StandIn(Tensor):
    """A tensor that has everything but data, on a device that need not be there."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, requires_grad: bool) -> StandIn:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{op}: a tensor without data was computed with")


def refusals(
    problem: Problem, predicate: str, rank: int, causal: bool = False, varlen: bool = False
) -> Iterator[Refusal]:
    """Why `natten.backends.<predicate>` says no, by the field that it concerns."""
    facts = (
        problem.num_heads,
        problem.num_kv_heads,
        problem.head_dim,
        problem.head_dim_v,
        problem.dtype,
        problem.needs_backward,
    )
    said = _said(predicate, rank, problem.device, problem.compute_capability, facts, causal, varlen)
    if said is not None:
        yield Refusal(*said)


@constant
def _said(
    predicate: str,
    rank: int,
    device: str,
    capability: tuple[int, int] | None,
    facts: Facts,
    causal: bool,
    varlen: bool,
) -> tuple[str, str] | None:
    """(field, message) of a no; None for a yes, or where the device is none of this machine."""
    where = torch.device(device) if device != "cuda" else _device_of(capability)
    if where is None:
        return None
    message = _ask(predicate, rank, where, facts, causal, varlen)
    if message is None:
        return None
    heads, kv_heads, dim, dim_v, dtype, backward = facts
    plainer: list[tuple[str, Facts, bool, bool]] = [
        ("num_kv_heads", (heads, heads, dim, dim_v, dtype, backward), causal, varlen),
        ("head_dim_v", (heads, kv_heads, dim, dim, dtype, backward), causal, varlen),
        ("bias", facts, False, False),
        ("backward", (heads, kv_heads, dim, dim_v, dtype, False), causal, varlen),
        ("dtype", (heads, kv_heads, dim, dim_v, torch.float16, backward), causal, varlen),
        ("head_dim", (heads, kv_heads, 64, 64, dtype, backward), causal, varlen),
    ]
    for field, changed, *masks in plainer:  # it concerns what need only be plainer to be taken
        if (changed, *masks) != (facts, causal, varlen) and _ask(predicate, rank, where, changed, *masks) is None:
            return field, message
    return "natten", message


def _ask(predicate: str, rank: int, device: torch.device, facts: Facts, causal: bool, varlen: bool) -> str | None:
    """What NATTEN says against it; None where it says nothing."""
    heads, kv_heads, dim, dim_v, dtype, backward = facts
    function = getattr(library.NATTEN.module().backends, predicate)
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"torch_compile": False} if "torch_compile" in known else {}
    for name, asked in (("is_causal", causal), ("is_varlen", varlen)):
        if name in known:
            options[name] = asked
        elif asked:
            return f"natten {library.NATTEN.installed()} has no {name.removeprefix('is_')} attention"
    tokens = (TOKENS,) * rank
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
    operands = [StandIn((1, *tokens, *size), dtype, device, backward) for size in sizes]
    try:
        accepted = function(*operands, raise_error=True, **options)
    except (RuntimeError, ValueError) as said:  # NotImplementedError is a RuntimeError
        return f"NATTEN says: {' '.join(str(said).split())}"
    return None if accepted else "NATTEN says no, without a reason"


def _device_of(capability: tuple[int, int] | None) -> torch.device | None:
    """A GPU of this machine of that compute capability; None where there is none."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if capability is None or torch.cuda.get_device_capability(index) == capability:
                return torch.device("cuda", index)
    return None
