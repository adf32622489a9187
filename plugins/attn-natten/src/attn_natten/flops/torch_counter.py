"""torch's FlopCounterMode: whether one is counting, and the formulas of this package's ops.

A counter copies the formulas that are known when it is made, and this package's are known once they are imported, which
may be later. So a counter that is found counting is told them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..log import logger

_modes_of_dispatch = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_state_of_jit_trace = torch._C._get_tracing_state


def is_in_a_trace_of_jit() -> bool:
    """Whether this call is traced by torch.jit, as it is by fvcore."""
    return _state_of_jit_trace() is not None


def is_counting() -> bool:
    """Whether the ops of this thread are counted, by a FlopCounterMode or in a trace of torch.jit, as fvcore does."""
    if _state_of_jit_trace() is not None:
        return True
    if not _modes_of_dispatch() or not _told():
        return False
    if _transform() is not None:
        logger.warning("FLOPs of fused calls within torch.func transforms are not counted: no op of theirs has a rule")
        return False
    return True


def _told() -> bool:
    """Whether there are FlopCounterModes; all of them know the formulas of this package then."""
    flop_counter: Any = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    counters: list[Any] = [getattr(mode, "counter", mode) for mode in _get_current_dispatch_mode_stack()]
    counters = [counter for counter in counters if isinstance(counter, flop_counter.FlopCounterMode)]
    if not counters:
        return False
    known = formulas()
    for counter in counters:
        for op, formula in known.items():
            counter.flop_registry.setdefault(op, formula)
    return True


def formulas() -> dict[Any, Any]:
    """The formulas of this package's ops, as a counter keeps them; torch knows them, too, from the first call on."""
    from torch.utils.flop_counter import flop_registry

    from . import registered

    return {op: flop_registry[op] for op in registered.OPS}
