"""What a call's shapes and parameters say, kept for the next call with the same: checking costs more than the rest.

Kept under all that it depends on, so nothing has to be forgotten when something changes; the number kept is bounded.
"""

from __future__ import annotations

from math import prod
from threading import Lock
from typing import Any, NamedTuple

from attn_core import AttnBias, Neighborhood
from torch import Tensor

from ..arguments import check_heads_last, neighborhood
from ..switches.strict import STRICT

#: Calls kept; the oldest goes when a new one comes.
KEPT = 1024


class Known(NamedTuple):
    """What is known of a call from its shapes and parameters."""

    parameters: tuple[Any, ...]  #: kernel_size, stride, dilation and is_causal, as they were given
    neighborhood: Neighborhood  #: what they mean
    bias: AttnBias | None  #: the simplest that is equal to it; None where every query sees every key
    out: tuple[int, ...]  #: shape of the output, `[batch, *spatial, num_heads, head_dim_v]`


_kept: dict[tuple[Any, ...], Known] = {}
_lock = Lock()


def known(rank: int, query: Tensor, key: Tensor, value: Tensor, *parameters: Any) -> Known:
    """What is known of this call; `parameters` are kernel_size, stride, dilation and is_causal.

    Raises what `look_at` does, where the arguments are new. Of known ones, dtypes and devices are not looked at.
    """
    try:
        place = (rank, query.shape, key.shape, value.shape, *parameters)
        found = _kept.get(place)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, symbolic; a list, or nothing that hashes
        return look_at(rank, query, key, value, *parameters)
    if found is not None and _alike(found.parameters, parameters) and not STRICT.value:
        return found
    made = look_at(rank, query, key, value, *parameters)
    with _lock:
        while len(_kept) >= KEPT:
            del _kept[next(iter(_kept))]
        _kept[place] = made
    return made


def look_at(rank: int, query: Tensor, key: Tensor, value: Tensor, *parameters: Any) -> Known:
    """Checks the operands and parameters. Raises what `check_heads_last` and `neighborhood` do."""
    spatial = check_heads_last(query, key, value, rank)
    kernel_size, stride, dilation, is_causal = parameters
    meant = neighborhood(spatial, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    size = prod(spatial)
    bias = meant.bind(size, size).normalize()
    return Known(parameters, meant, bias, (*query.shape[:-1], value.shape[-1]))


def _alike(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    """Whether equal parameters are also of equal types: 1, 1.0 and True are one key of a dict."""
    for one, other in zip(these, those):
        if one is not other:
            if type(one) is not type(other):
                return False
            if isinstance(one, tuple) and any(type(a) is not type(b) for a, b in zip(one, other)):
                return False
    return True
