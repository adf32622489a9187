"""A bias, taken apart for a graph: what of it is constant as text, and the tensors that it holds beside that.

    Causal() + ALiBi(8, slopes)      "('attn_core.bias.sum:Sum', …)"  and  [slopes]
    KeyPadding(seqlens)              "('attn_core.bias.key_padding:KeyPadding', …)"  and  [seqlens]

The text is made of the bias's `facts`, so that one rule does for every kind, a stranger's too; its lengths, batch
entries and heads are not in it. `put_together` makes the bias of both again, where the tensors have values.

Kinds are told by module and name, as pickle does it. One that is not found under its name, as a class within a
function, gets a number, and is known for as long as it lives, in this process.
"""

from __future__ import annotations

import ast
import itertools
import math
import sys
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...bias import AttnBias
from ...bias.fields import Unwritable
from ...errors import InputError
from ...tracing import constant, constants

#: What is written where there is no bias.
NOTHING = "None"

#: Values that are written as they are.
PLAIN = (type(None), bool, int, str, bytes)

#: (kind, facts, whether it has several batch entries, and heads)
Told = tuple[type[AttnBias], tuple[Any, ...], bool, bool]


def taken_apart(bias: AttnBias | None) -> tuple[str, list[Tensor]]:
    """The text and the tensors of a bias for which there is no reason `why_not`; those of its scores come first."""
    if bias is None:
        return NOTHING, []
    of_scores = [tensor for score in bias.scores for tensor in score.held().values()]
    # A mask has no gradient, whatever it holds; and it comes last in a sum.
    of_mask = [] if bias.mask is None else list(bias.mask.held().values())
    of_mask = [tensor.detach() if tensor.requires_grad else tensor for tensor in of_mask]
    return written(told(bias)), of_scores + of_mask


def why_not(bias: AttnBias) -> str | None:
    """Why a bias cannot be written, for people; None where it can."""
    return obstacle(told(bias))


def told(bias: AttnBias) -> Told:
    """What of a bias is written: constants, where a graph is traced."""
    batch, heads = bias.batch_and_heads
    # Branching on a symbolic size, not bool(), makes the answer a constant of the graph.
    many_batches, many_heads = (True if size != 1 else False for size in (batch, heads))  # noqa: SIM210
    return type(bias), constants(bias.facts()), many_batches, many_heads


@constant
def obstacle(facts: Told) -> str | None:
    """What of it cannot be written, None where all can."""
    for value in _leaves(facts):
        if isinstance(value, type):
            why: str | None = getattr(value, "why", None) if issubclass(value, Unwritable) else None
            if why is not None:
                return why
        elif type(value) not in (*PLAIN, float, torch.dtype):
            return f"{facts[0].__name__} holds a {type(value).__name__}, which is neither a plain value nor a tensor"
    return None


def _leaves(value: Any) -> list[Any]:
    return [leaf for inner in value for leaf in _leaves(inner)] if type(value) in (tuple, list) else [value]


@constant
def written(facts: Told) -> str:
    """As text, which `read` reads."""

    def plain(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(plain, value))
        if isinstance(value, type):
            return {"kind": kinds.name_of(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return {"float": repr(value)} if type(value) is float and not math.isfinite(value) else value

    return repr(plain(facts))


@lru_cache(maxsize=64)
def read(text: str) -> Told | None:
    """What was told. Raises InputError for a kind that is not known in this process."""

    def meant(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(meant, value))
        if not isinstance(value, dict):
            return value
        ((what, name),) = value.items()
        return {"kind": kinds.found, "dtype": torch.__dict__.__getitem__, "float": float}[what](name)

    found: Told | None = meant(ast.literal_eval(text))
    return found


def put_together(
    text: str, held: Sequence[Tensor], batch: int, heads: int, lengths: tuple[int, int]
) -> AttnBias | None:
    """The bias of this text, holding these tensors, in a call of these sizes."""
    facts = read(text)
    if facts is None:
        return None
    kind, own, many_batches, many_heads = facts
    without_data = kind.from_facts(own, batch if many_batches else 1, heads if many_heads else 1, lengths)
    return without_data.with_held(dict(zip(without_data.held(), held)))


class Kinds:
    """Names of classes of biases."""

    def __init__(self) -> None:
        self._numbered: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
        self._number = itertools.count()

    def name_of(self, kind: type) -> str:
        name = f"{kind.__module__}:{kind.__qualname__}"
        if self._at(name) is kind:
            return name
        for numbered, other in list(self._numbered.items()):
            if other is kind:
                return numbered
        numbered = f"{name}#{next(self._number)}"
        self._numbered[numbered] = kind
        return numbered

    def found(self, name: str) -> type:
        kind = self._numbered.get(name) or self._at(name)
        if not isinstance(kind, type):
            where = name.partition(":")[0]
            raise InputError(
                f"torch/tiled: this graph was made with the kind of bias {name}, which is not known here: import"
                f" {where} before; one that is defined within a function is known to the process that did so alone"
            )
        return kind

    def _at(self, name: str) -> Any:
        module, _, path = name.partition(":")
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        return found


kinds = Kinds()
