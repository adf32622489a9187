"""The choice while a graph is traced.

Forced by these facts of torch.compile:
- It traces once per graph, so it may be slow; but what traced code reads becomes a guard, paid at every call. So the
  kernels are weighed by one function whose result is a constant of the graph (`shortlist`). Its arguments are the plain
  facts of the call; guards are on those, on this thread's scope and on the registry's generation.
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

from .adapt import ADAPTATIONS, Adaptation
from .bias import AttnBias, as_bias
from .bias.base import known
from .bind import bind
from .bind import heads_of as layout_of
from .broadcast import broadcasting
from .cost import seconds
from .dispatch import (
    ATTENTION,
    SDPA_GQA,
    as_under_autocast,
    autocast_of,
    heads_of,
    stock_sdpa,
    what_is_foreign,
)
from .door import examine
from .errors import NoKernelError
from .problem import Problem
from .registry import registry
from .scope import Settings, current, mirror
from .select import choose, rank
from .tracing import constant, has_static_value

#: What a symbolic length is taken for where kernels are weighed; only whether the two are equal matters there.
STAND_IN = (512, 768)

#: Fields of a problem that are plain values while a graph is traced.
PLAIN = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "head_dim_v",
    "dtype",
    "device",
    "compute_capability",
    "return_lse",
    "requires_grad",
    "bias_requires_grad",
    "deterministic",
    "forward_ad",
    "compiling",
    "strided_head_dim",
)


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
    bias = as_bias(bias)
    if door != ATTENTION:
        reason = what_is_foreign(query, key, value)
        if reason is not None:
            return stock_sdpa(door, query, key, value, bias, scale, dropout_p, reason)
        folding = broadcasting(query, key, value, door == SDPA_GQA)
        if folding is not None:
            fold, unfold = folding
            folded = fold(query, key, value, bias)
            return unfold(traced(SDPA_GQA, *folded, scale, softcap, dropout_p, return_lse, kernel))
    cast_to = autocast_of(query)
    if cast_to is not None:
        query, key, value = (as_under_autocast(tensor, cast_to) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return _chosen(door, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)
    return _chosen(door, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)


def _chosen(
    door: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    kernel: str | None,
) -> Any:
    heads = heads_of(door)
    problem, bound = examine(query, key, value, bias, scale, softcap, dropout_p, return_lse, heads)
    sizes = problem.batch, problem.seqlen_q, problem.seqlen_kv
    fixed = tuple(operator.index(size) if has_static_value(size) else None for size in sizes)
    rows = shortlist(
        operator.index(registry.generation),  # else an int of a global may count as symbolic
        mirror.prefer,
        mirror.approximate,
        kernel,
        fixed,
        known(problem.seqlen_q == problem.seqlen_kv),
        tuple(getattr(problem, field) for field in PLAIN),
        softcap is not None,
        # A default float counts as symbolic; branching on it, not bool(), makes it a constant.
        True if dropout_p else False,  # noqa: SIM210
        None
        if bound is None
        else (type(bound), _plain(bound.facts()), tuple(size != 1 for size in bound.batch_and_heads)),
    )
    name, kernel_heads, _, _, steps, _ = _best(rows, problem)
    note(name, tuple(ADAPTATIONS[index].name for index, _ in steps), described(problem, fixed))
    call = bind(registry.traceable[name], kernel_heads, _rewritten(problem, steps), problem, bound, heads)
    return call(query, key, value, bound)


def _plain(facts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Facts of a bias with symbolic numbers made constants of the graph: one window, one graph."""
    numbers = (int, torch.SymInt)
    return tuple(
        operator.index(fact) if isinstance(fact, numbers) and not isinstance(fact, bool) else fact for fact in facts
    )


def _best(rows: tuple[Any, ...], problem: Problem) -> Any:
    """The row of the kernel that runs; the first whose own limits, asked with symbolic lengths, do not refuse."""
    while rows:
        group = [row for row in rows if row[2] == rows[0][2]]  # the best place in the scope's order
        best = group[0]
        if len(group) > 1:
            left = problem.pairs_left() if any(row[3][4] for row in group) else 0.0
            least = None
            for row in group:
                estimate = seconds(row[3], problem.batch, problem.seqlen_q, problem.seqlen_kv, left)
                if least is None or estimate < least:
                    best, least = row, estimate
        if not best[5] or not list(registry.refusers[best[0]](problem)):
            return best
        rows = tuple(row for row in rows if row[0] != best[0])
    raise NoKernelError(f"no kernel takes this problem: {problem}")


def _rewritten(problem: Problem, steps: tuple[Any, ...]) -> tuple[tuple[Adaptation, Problem], ...]:
    """The adaptations, each with the problem that it makes."""
    made = []
    for index, changes in steps:
        problem = replace(problem, **dict(changes))
        made.append((ADAPTATIONS[index], problem))
    return tuple(made)


@constant
def note(kernel: str, adaptations: tuple[str, ...], reason: str) -> None:
    """Tells the recorders of this task what was chosen; runs once, when the graph is traced."""
    for recorder in current.get().recorders:
        recorder.note_traced(kernel, adaptations, reason)


@constant
def shortlist(
    generation: int,
    prefer: tuple[str, ...],
    approximate: bool,
    forced: str | None,
    sizes: tuple[int | None, ...],
    equal_lengths: bool,
    plain: tuple[Any, ...],
    softcap: bool,
    dropout: bool,
    bias: tuple[type[AttnBias], tuple[Any, ...], tuple[bool, ...]] | None,
) -> tuple[Any, ...]:
    """The kernels that take such a call, best first, as constants.

    A row is (name, dimension of the heads, place in the scope's order, coefficients of the estimate, adaptations as
    (index, sizes that they change), whether its own limits are still to be asked). Raises what `choose` raises.
    """
    batch = 2 if sizes[0] is None else sizes[0]
    seqlen_q = STAND_IN[0] if sizes[1] is None else sizes[1]
    seqlen_kv = (seqlen_q if equal_lengths else STAND_IN[1]) if sizes[2] is None else sizes[2]
    values = dict(zip(PLAIN, plain))
    stand_in = None
    if bias is not None:
        kind, facts, (many_batches, many_heads) = bias
        heads = values["num_heads"] if many_heads else 1
        stand_in = kind.from_facts(facts, batch if many_batches else 1, heads, (seqlen_q, seqlen_kv))
    problem = Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        bias=stand_in,
        softcap=1.0 if softcap else None,
        dropout_p=0.1 if dropout else 0.0,
        **values,
    )
    settings = Settings(prefer=prefer, allow=frozenset({"approximate"}) if approximate else frozenset())
    symbolic = None in sizes
    limits = not symbolic
    chosen = choose(registry, problem, settings, forced, limits=limits)  # raises where nothing takes it
    candidates = [chosen]
    if forced is None:
        candidates = [each for each in rank(registry, problem, settings, limits=limits) if each.takes]
    rows = []
    for candidate in candidates:
        registry.make_traceable(candidate.kernel)
        before, steps = problem, []
        for adaptation, after in candidate.steps:
            changes = [
                (field, getattr(after, field)) for field in PLAIN if getattr(after, field) != getattr(before, field)
            ]
            steps.append((ADAPTATIONS.index(adaptation), tuple(changes)))
            before = after
        place = len(prefer) if candidate.preferred is None else candidate.preferred
        assert candidate.terms is not None
        refuses = symbolic and candidate.kernel.refuse is not None
        row = candidate.kernel.name, layout_of(candidate.kernel), place, tuple(candidate.terms), tuple(steps), refuses
        rows.append(row)
    return tuple(rows)


def described(problem: Problem, fixed: tuple[int | None, ...]) -> str:
    """What was asked, with `*` for a symbolic size."""
    batch, seqlen_q, seqlen_kv = ("*" if size is None else str(size) for size in fixed)
    kind = "" if problem.bias is None else f", {type(problem.bias).__name__}"
    heads = f"heads {problem.num_heads}:{problem.num_kv_heads}, head_dim {problem.head_dim}:{problem.head_dim_v}"
    return f"batch {batch}, seqlen {seqlen_q}x{seqlen_kv}, {heads}, {problem.dtype}, {problem.device}{kind}"
