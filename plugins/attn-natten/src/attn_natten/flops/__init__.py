"""Counting FLOPs: of the matrix products of neighborhood attention, by formula, by torch's counter, or by fvcore.

- `formulas.py`: the count of one call from its shapes.
- `counted.py`: the op that a fused call is while somebody counts.
- `unfused_in_a_trace.py`: the ops that unfused calls are in a trace, as fvcore makes one.
- `torch_counter.py`: torch's `FlopCounterMode`.
- `fvcore_counter.py`: fvcore, which reports multiply-accumulates; installed or not.
"""

from __future__ import annotations

from .formulas import fna_flop_count, na_av_flop_count, na_qk_flop_count
from .fvcore_counter import add_natten_handle, get_flops

__all__ = ["add_natten_handle", "fna_flop_count", "get_flops", "na_av_flop_count", "na_qk_flop_count"]
