"""The choice while a graph is traced.

Forced by these facts of torch.compile:
- It traces once per graph, so it may be slow; but what traced code reads (a global, a function, a constant of a module)
  becomes a guard, paid at every call. So all that can be plain Python is in one function whose result is a constant of
  the graph, `weigh`; the traced code around it is short and calls little. Guards are left on the facts that it is
  given, on this thread's scope and on the registry's generation.
- Lengths may be symbolic. Comparing two estimates then puts a guard where they cross: one graph where one kernel is
  best at every length, one more per change of the choice. Acceptance does not depend on a symbolic length, except by a
  kernel's own `refuse`, which is asked with the symbolic problem.
- Locks, ContextVars and dicts keyed by shapes cannot be traced, nor may a side effect (a count) be part of a graph.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .adapt import ADAPTATIONS
from .bias import AttnBias, as_bias
from .bind import bind
from .bind import heads_of as layout_of
from .broadcast import broadcasting
from .cost import seconds
from .dispatch import ATTENTION, SDPA_GQA, as_under_autocast, autocast_of, heads_of, stock_sdpa, what_is_foreign
from .door import compute_capability, examine
from .errors import InputError, NoKernelError
from .problem import Problem
from .registry import registry
from .scope import Settings, current, mirror
from .select import choose, rank
from .tracing import constant, has_static_value

#: What a symbolic size is taken for where kernels are weighed; only whether the lengths are equal matters there.
STAND_IN_BATCH, STAND_IN_LENGTHS = 2, (512, 768)

#: Sizes that an adaptation may change.
SIZES = ("num_kv_heads", "head_dim", "head_dim_v")


def traced(
    door: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    kernel: str | None,
) -> Any:
    """One attention call inside a graph: chooses now, and leaves nothing but the kernel in it."""
    if bias is not None:
        bias = as_bias(bias)
    if door or type(query) is not Tensor or type(key) is not Tensor or type(value) is not Tensor:
        reason = what_is_foreign(query, key, value)
        if reason is not None and door != ATTENTION:
            return stock_sdpa(door, query, key, value, bias, scale, dropout_p, reason)
        folding = broadcasting(query, key, value, door == SDPA_GQA) if door != ATTENTION else None
        if folding is not None:
            fold, unfold = folding
            folded = fold(query, key, value, bias)
            return unfold(_chosen(SDPA_GQA, *folded, scale, softcap, dropout_p, return_lse, kernel))
    return _chosen(door, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)
