"""The choice while a graph is traced.

Forced by these facts of torch.compile:
- It traces once per graph, so it may be slow; but what traced code reads (a global, a function, a constant of a module)
  becomes a guard, paid at every call. So all that can be plain Python is in one function whose result is a constant of
  the graph, `weigh`; the traced code around it is short and calls little. Guards are left on the facts that it is
  given, on this thread's scope and on the registry's generation.
- Lengths may be symbolic. Comparing two estimates then puts a guard where they cross: one graph where one kernel is
  best at every length, one more per change of the choice. Acceptance does not depend on a symbolic length, except by a
  kernel's own `refuse`, which is asked with the symbolic problem. An exported graph cannot be traced again, so there
  the choice is made once, by the estimates at stand-in lengths.
- Locks, ContextVars and dicts keyed by shapes cannot be traced, nor may a side effect (a count) be part of a graph.
"""

from __future__ import annotations

import operator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .adapt import ADAPTATIONS
from .bias import AttnBias, as_bias
from .bias.base import known
from .bind import bind
from .bind import heads_of as layout_of
from .broadcast import broadcasting
from .by_methods import REASON, check_options, dispatched, materialized, name_of
from .cost import seconds
from .dispatch import ATTENTION, SDPA, SDPA_GQA, as_under_autocast, autocast_of, stock_sdpa, what_is_foreign
from .door import (
    HEADS_FIRST,
    HEADS_LAST,
    LARGEST,
    check_bias,
    check_dropout,
    check_rank,
    check_scale,
    check_softcap,
    check_tensors,
    compute_capability,
    examine,
    lengths_of,
    refuse_pages,
)
from .errors import InputError, InputTypeError, KernelRefusedError, NoKernelError
from .kernel import Run
from .problem import Problem
from .record import STOCK
from .registry import registry
from .scope import current, mirror
from .select import Candidate, check_strict, choose, rank, strict_scope
from .tracing import constant, constants, has_static_value

#: What a symbolic size is taken for where kernels are weighed; only whether the lengths are equal matters there.
STAND_IN_BATCH, STAND_IN_LENGTHS = 2, (512, 768)

#: What is asked beside operands and bias: (scale, softcap, dropout_p, return_lse, kernel).
Asked = tuple[float | None, float | None, float, bool, str | None]

#: What a number may be while a graph is traced.
NUMBER = (int, float, torch.SymInt, torch.SymFloat)

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
    asked = scale, softcap, dropout_p, return_lse, kernel
    if bias is not None:
        bias = as_bias(bias)
        if bias is not None and bias.by_methods:
            if not bias.needs_materialization():
                return by_own_dispatch(door, query, key, value, bias, asked)
            bias = materialized(bias, query)
        if door:
            refuse_pages(bias)
    if type(query) is not Tensor or type(key) is not Tensor or type(value) is not Tensor:
        check_tensors(query, key, value)
        reason = what_is_foreign(query, key, value)
        if reason is not None and door != ATTENTION:
            check_strict(STOCK, reason, mirror.said.only)
            return stock_sdpa(door, query, key, value, bias, scale, dropout_p, reason)
        if reason is not None:
            raise InputTypeError(f"attention takes plain tensors, got {reason}")
    if door and not (query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]):
        folding = broadcasting(query, key, value, door == SDPA_GQA)
        if folding is not None:
            fold, unfold = folding
            folded = fold(query, key, value, bias)
            return unfold(_chosen(SDPA_GQA, *folded, asked))
    return _chosen(door, query, key, value, bias, asked)


def by_own_dispatch(
    door: int, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias, asked: tuple[Any, ...]
) -> Tensor:
    """A bias's own call inside a graph: all of it is traced."""
    scale, softcap, dropout_p, return_lse, kernel = asked
    check_options(bias, softcap, return_lse, kernel)
    check_strict(name_of(bias), REASON, mirror.said.only)
    note_own(name_of(bias))
    return dispatched(bias, query, key, value, scale, dropout_p, door == ATTENTION, door != SDPA)


@constant
def note_own(name: str) -> None:
    """Tells the recorders of this task; runs once, when the graph is traced."""
    for recorder in current.get().recorders:
        recorder.note_traced(name, (), REASON)


def _chosen(door: int, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, asked: Asked) -> Any:
    cast_to = _autocast_dtype(query.device.type, query.is_floating_point())
    if cast_to is not None:
        query, key, value = (as_under_autocast(tensor, cast_to) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            return _run(door, query, key, value, bias, asked)
    return _run(door, query, key, value, bias, asked)


def _run(door: int, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, asked: Asked) -> Any:
    scale, softcap, dropout_p, return_lse, kernel = asked
    heads = HEADS_FIRST if door else HEADS_LAST
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_rank(name, tensor, heads)
    # Of a symbolic number, a comparison is a guard.
    if softcap is not None and not (isinstance(softcap, NUMBER) and 0.0 < softcap <= LARGEST):
        check_softcap(softcap)
    if not (isinstance(dropout_p, NUMBER) and 0.0 <= dropout_p < 1.0):
        check_dropout(dropout_p)
    batch, seqlen_q, seqlen_kv = lengths_of(query, key, value, bias, heads)
    bound = None
    if bias is not None:
        bound = check_bias(bias, batch, query.shape[heads], seqlen_q, seqlen_kv, query.device)
    head_dim = operator.index(query.shape[3])
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0  # `weigh` refuses a size of 0
    elif not (isinstance(scale, NUMBER) and scale == scale):  # NaN is not
        check_scale(scale, head_dim)
    weighed_scale = scale if has_static_value(scale) else _of_its_sign(scale)
    # Facts as constants. Numbers may be symbolic where they are not sizes, too: operator.index, or branching on one,
    # makes a constant of it.
    rows, plain = weigh(
        operator.index(registry.generation),
        *mirror.said,
        kernel,
        heads,
        tuple(operator.index(size) if has_static_value(size) else None for size in (batch, seqlen_q, seqlen_kv)),
        known(seqlen_q == seqlen_kv),
        weighed_scale,
        tuple(
            (
                operator.index(tensor.shape[heads]),
                operator.index(tensor.shape[3]),
                tensor.dtype,
                tensor.device,
                tensor.requires_grad,
                True if tensor.stride(3) == 1 else False,  # noqa: SIM210
            )
            for tensor in (query, key, value)
        ),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        None if softcap is None else _in_millionths(softcap, 1.0),
        _in_millionths(dropout_p, 0.5) if dropout_p else 0,
        return_lse,
        None if bound is None else _facts(bound),
    )
    row = rows[0]
    if len(rows) > 1 or row[5]:
        lengths: dict[str, Any] = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
        problem = Problem(bias=bound, scale=weighed_scale, **lengths, **dict(plain))
        row = _best(rows, problem)
        note(row[0], tuple(index for index, _ in row[4]), plain, None if bound is None else type(bound))
    name, kernel_heads, _, _, steps, _ = row
    run = getattr(registry.traceable, name)
    if steps:
        options = {"softcap": softcap, "dropout_p": dropout_p, "return_lse": return_lse}
        problem = Problem(
            batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, bias=bound, scale=scale, **{**dict(plain), **options}
        )
        return bind(run, kernel_heads, _steps(problem, steps), problem, bound, heads)(query, key, value, bound)
    return _call(run, kernel_heads != heads, query, key, value, bound, scale, softcap, dropout_p, return_lse)


def _call(
    run: Run,
    swapped: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Any:
    """Runs a kernel that takes the call as it is; `bind` would do the same, and cost more guards."""
    if swapped:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"scale": scale}
    if bias is not None:
        options["bias"] = bias
    if softcap is not None:
        options["softcap"] = softcap
    if dropout_p:
        options["dropout_p"] = dropout_p
    if not return_lse:
        out = run(query, key, value, **options)
        return out.transpose(1, 2) if swapped else out
    out, lse = run(query, key, value, return_lse=True, **options)
    return (out.transpose(1, 2) if swapped else out), lse


def _facts(bias: AttnBias) -> tuple[Any, ...]:
    """Of a bias, what `weigh` is told: one window, one graph."""
    many_batches, many_heads = bias.batch_and_heads
    return (
        type(bias),
        constants(bias.facts()),
        True if many_batches != 1 else False,  # noqa: SIM210
        True if many_heads != 1 else False,  # noqa: SIM210
        bias.requires_grad,
    )


def _in_millionths(number: float, stand_in: float) -> int:
    """A number above 0 as a constant of the graph, or what a symbolic one is taken for; at least 1.

    One that never changes may be symbolic all the same, as a function's default is where sizes are dynamic. An int made
    of it is none.
    """
    return max(1, operator.index(int(1e6 * (number if has_static_value(number) else stand_in) + 0.5)))


def _of_its_sign(scale: float) -> float:
    """What a symbolic scale is taken for where kernels are weighed: some have limits on its sign."""
    return 1.0 if scale > 0 else 0.0 if scale == 0 else -1.0


def _best(rows: tuple[Any, ...], problem: Problem) -> Any:
    """The row of the kernel that runs; the first whose own limits, asked with symbolic lengths, do not refuse."""
    while rows:
        group = [row for row in rows if row[2] == rows[0][2]]  # the best place in the scope's order
        best = group[0]
        if len(group) > 1 and not torch.compiler.is_exporting():
            left = problem.pairs_left() if any(row[3][4] for row in group) else 0.0
            least = None
            for row in group:
                estimate = seconds(row[3], problem.batch, problem.seqlen_q, problem.seqlen_kv, left)
                if least is None or estimate < least:
                    best, least = row, estimate
        if not best[5] or not list(getattr(registry.refusers, best[0])(problem)):
            return best
        rows = tuple(row for row in rows if row[0] != best[0])
    if mirror.said.only:
        raise KernelRefusedError(f"{strict_scope(mirror.said.only)}: none of these takes this problem: {problem}")
    raise NoKernelError(f"no kernel takes this problem: {problem}")


def _steps(problem: Problem, steps: tuple[Any, ...]) -> tuple[Any, ...]:
    """The adaptations, each with the problem that it makes."""
    made = []
    for index, changes in steps:
        problem = replace(problem, **dict(changes))
        made.append((ADAPTATIONS[index], problem))
    return tuple(made)


@constant
def _autocast_dtype(device: str, floating: bool) -> torch.dtype | None:
    """What operands are cast to under autocast, which dynamo guards by itself."""
    return autocast_of(torch.empty(0, device=device)) if floating else None


@constant
def note(kernel: str, steps: tuple[int, ...], plain: tuple[tuple[str, Any], ...], kind: type[AttnBias] | None) -> None:
    """Tells the recorders of this task what was chosen; runs once, when the graph is traced."""
    recorders = current.get().recorders
    if recorders:
        facts = dict(plain)
        call = (
            f"heads {facts['num_heads']}:{facts['num_kv_heads']}, head_dim {facts['head_dim']}:{facts['head_dim_v']},"
            f" {str(facts['dtype']).removeprefix('torch.')}, {facts['device']}{f', {kind.__name__}' if kind else ''}"
        )
        for recorder in recorders:
            recorder.note_traced(kernel, tuple(ADAPTATIONS[index].name for index in steps), call)


@constant
def weigh(
    generation: int,
    prefer: tuple[str, ...],
    only: tuple[str, ...],
    allow: tuple[str, ...],
    forced: str | None,
    heads: int,
    sizes: tuple[int | None, ...],
    equal_lengths: bool,
    scale: float,
    operands: tuple[tuple[int, int, torch.dtype, torch.device, bool, bool], ...],
    grad: bool,
    deterministic: bool,
    softcap: int | None,
    dropout_p: int,
    return_lse: bool,
    bias: tuple[Any, ...] | None,
) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """(rows, facts): the kernels that take such a call, best first, and the fields of its problem, as constants.

    A row is (name, dimension of the heads, place in the scope's order, coefficients of the estimate, adaptations as
    (index, sizes that they change), whether its own limits are still to be asked). Where no size is symbolic, the
    choice is made here, and there is one row. `softcap` and `dropout_p` are in millionths. Raises what the call would
    raise.
    """
    symbolic = None in sizes
    batch = STAND_IN_BATCH if sizes[0] is None else sizes[0]
    seqlen_q = STAND_IN_LENGTHS[0] if sizes[1] is None else sizes[1]
    seqlen_kv = (seqlen_q if equal_lengths else STAND_IN_LENGTHS[1]) if sizes[2] is None else sizes[2]
    device = operands[0][3]
    for name, operand in zip(("key", "value"), operands[1:]):
        if operand[3] != device:
            raise InputError(f"{name}: must be on query's device {device}, got {operand[3]}")
    query, key, value = (
        _stand_in((batch, seqlen, *operand), heads)
        for seqlen, operand in zip((seqlen_q, seqlen_kv, seqlen_kv), operands)
    )
    problem, _ = examine(
        query,
        key,
        value,
        None,
        scale,
        None if softcap is None else softcap / 1e6,
        min(dropout_p, 999_999) / 1e6,
        return_lse,
        heads,
    )
    stand_in_bias, bias_requires_grad = None, False
    if bias is not None:
        kind, facts, many_batches, many_heads, bias_requires_grad = bias
        shape = (batch if many_batches else 1), (problem.num_heads if many_heads else 1)
        stand_in_bias = kind.from_facts(facts, *shape, (seqlen_q, seqlen_kv))
    problem = replace(
        problem,
        device=device.type,
        compute_capability=compute_capability(device.index) if device.type == "cuda" else None,
        bias=stand_in_bias,
        requires_grad=grad and any(operand[4] for operand in operands),
        bias_requires_grad=grad and bias_requires_grad,
        deterministic=deterministic,
        forward_ad=forward_ad._current_level >= 0,  # guarded by dynamo itself, as the levels of functorch are
        compiling=True,
    )
    said = current.get().settings  # raises for a bad variable
    settings = replace(said, prefer=prefer, only=only, allow=frozenset(allow))
    candidates = [choose(registry, problem, settings, forced, limits=not symbolic)]
    if forced is None and symbolic:
        candidates = [each for each in rank(registry, problem, settings, limits=False, every=False) if each.takes]
    lengths = ("batch", "seqlen_q", "seqlen_kv", "bias", "scale")
    plain = tuple((f.name, getattr(problem, f.name)) for f in fields(problem) if f.name not in lengths)
    rows = tuple(_row(candidate, problem, len(prefer), symbolic) for candidate in candidates)
    if len(rows) == 1 and not rows[0][5]:  # else it is only known to the traced code what is chosen
        note(rows[0][0], tuple(index for index, _ in rows[0][4]), plain, None if bias is None else bias[0])
    return rows, plain


def _stand_in(facts: tuple[Any, ...], heads: int) -> Tensor:
    """An operand without data that looks as the traced one does."""
    batch, seqlen, num_heads, dim, dtype, _, _, unit_stride = facts
    shape = (batch, seqlen, num_heads, dim) if heads == HEADS_LAST else (batch, num_heads, seqlen, dim)
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor if unit_stride else tensor.mT.contiguous().mT


def _row(candidate: Candidate, problem: Problem, last: int, symbolic: bool) -> tuple[Any, ...]:
    kernel = candidate.kernel
    registry.make_traceable(kernel)
    before, steps = problem, []
    for adaptation, after in candidate.steps:
        changes = tuple((size, getattr(after, size)) for size in SIZES if getattr(after, size) != getattr(before, size))
        steps.append((ADAPTATIONS.index(adaptation), changes))
        before = after
    place = last if candidate.preferred is None else candidate.preferred
    assert candidate.terms is not None
    refuses = symbolic and kernel.refuse is not None
    return kernel.name, layout_of(kernel), place, tuple(candidate.terms), tuple(steps), refuses
