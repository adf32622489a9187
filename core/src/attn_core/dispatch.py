"""The path of a call: look the choice up; where it is new, check, choose, bind, and keep it.

A choice is kept under what is cheap to compare (options, shapes of query and key, the bias's own key), and beside it a
function that recognises everything else that a capability or a kernel's memory safety depends on. What it recognises
can run without another look. Subclasses and symbolic shapes are never kept, and take the slow way each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from .bias import AttnBias, Causal, TensorBias, as_bias
from .bind import bind, simplified, under_autocast
from .bind import heads_of as layout_of
from .broadcast import broadcasting
from .by_methods import REASON, by_its_rule, check_options, dispatched, materialized, name_of
from .door import HEADS_FIRST, HEADS_LAST, check_tensors, examine, foreign, refuse_pages
from .errors import AttnError, InputTypeError
from .kernel import Bound
from .problem import Problem
from .recognise import recogniser
from .record import STOCK, recording
from .registry import registry
from .running import as_kernel, marked
from .scope import Choice, Scope, current
from .select import Candidate, check_strict, choose, with_plain_lengths
from .tracing import constant

if TYPE_CHECKING:
    from .usage import Usage

_is_grad_enabled = torch.is_grad_enabled
_is_deterministic = torch._C._get_deterministic_algorithms
_stock_sdpa = torch._C._nn.scaled_dot_product_attention

#: Doors: who calls, and in which layout.
ATTENTION = 0  #: heads-last, four dimensions
SDPA = 1  #: heads-first, any leading dimensions
SDPA_GQA = 2  #: the same, with enable_gqa=True
#: What the doors are called.
NAMES = ("attention", "scaled_dot_product_attention", "scaled_dot_product_attention")

#: What a call asks beside its operands and bias: (door, scale, softcap, dropout_p, return_lse, kernel).
Options = tuple[int, float | None, float | None, float, bool, str | None]

#: Classes of tensors of which all that matters is seen.
PLAIN = (Tensor, Parameter)
#: What is found where nothing is.
NOTHING: Choice = (lambda *looked_at: False, None, lambda *call: None)


def call(
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
    """Runs one attention call by the kernel chosen for it."""
    scope = current.get()
    bias_key: Any = None
    looked_at: tuple[Tensor, ...] = (query, key, value)
    run: Any
    try:
        if bias is None:
            pass
        elif type(bias) is TensorBias:  # its tensor is looked at as the operands are
            bias_key, looked_at = (TensorBias, bias.lengths), (query, key, value, bias.tensor)
        elif type(bias) in PLAIN:
            bias_key, looked_at = Tensor, (query, key, value, bias)
        else:
            bias_key = (bias.key,)
        asked: Any = (
            door,
            scale,
            softcap,
            dropout_p,
            return_lse,
            kernel,
            _is_grad_enabled(),
            _is_deterministic(),
            forward_ad._current_level,
            bias_key,
            key.numel(),
        )
        recognise, cast_to, run = scope.latest.get(asked, NOTHING)
        if not recognise(*looked_at) or (cast_to is not None and cast_to is not autocast_of(query)):
            run = look_up(scope, asked, looked_at)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, symbolic, or a foreign bias
        asked = run = None
    if run is None:
        options = door, scale, softcap, dropout_p, return_lse, kernel
        run = choose_anew(scope, query, key, value, bias, options, asked, looked_at)
    try:
        return run(query, key, value, bias)
    except Exception as error:
        explain_failure(run, error)
        raise


def look_up(scope: Scope, asked: Any, looked_at: tuple[Tensor, ...]) -> Bound | None:
    """The function kept for such a call, which is the latest from now on; None where there is none."""
    latest = scope.latest  # read before the table: see Scope
    for choice in scope.get((asked, looked_at[0].shape, looked_at[1].shape), ()):
        recognise, cast_to, run = choice
        if recognise(*looked_at) and (cast_to is None or cast_to is autocast_of(looked_at[0])):
            latest[asked] = choice
            return run
    return None


@as_kernel()
def choose_anew(
    scope: Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    options: Options,
    asked: Any,
    looked_at: tuple[Tensor, ...],
) -> Bound:
    """Makes the choice for a call, and keeps it where all that is looked at is plain; `asked` is None where not."""
    generation = registry.generation
    converted = as_bias(bias)
    if converted is not None and converted.by_methods:
        return by_methods(scope, converted, options)
    if not (converted is bias or type(converted) is TensorBias):  # another library's mask: what it means may be kept
        return calling_with(lambda query, bias: as_bias(bias), options)
    run = decide(scope, query, key, value, converted, options)
    ours = run.candidate is not None  # type: ignore[attr-defined]  # else handed to torch: may not even have strides
    seen = converted is bias or type(bias) in PLAIN
    if converted is not bias:
        run = converting(run, TensorBias if seen else as_bias)
    if scope.usages:
        run = counting(run, scope.usages, NAMES[options[0]])
    if ours and seen and asked is not None and all(type(tensor) in PLAIN for tensor in looked_at):
        place = asked, query.shape, key.shape
        scope.keep(asked, place, (recogniser(looked_at), autocast_of(query), run), generation)
    return run


def converting(run: Bound, convert: Callable[[Any], AttnBias | None]) -> Bound:
    """`run` for a bias as the caller has it: a tensor, or an object of another library."""

    def converted(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return run(query, key, value, convert(bias))

    return _made_for(converted, run.candidate, run.problem)  # type: ignore[attr-defined]


def by_methods(scope: Scope, bias: AttnBias, options: Options) -> Bound:
    """The function for a bias that is known by its three methods; for one call, since they may answer otherwise."""
    door, scale, softcap, dropout_p, return_lse, kernel = options
    if bias.needs_materialization():
        return calling_with(lambda query, bias: materialized(as_bias(bias), query), options)
    check_options(bias, softcap, return_lse, kernel)
    check_strict(name_of(bias), REASON, scope.settings.only)

    def dispatching(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return dispatched(as_bias(bias), query, key, value, scale, dropout_p, door == ATTENTION, door != SDPA)

    run = marked(dispatching)
    if scope.recorders:
        run = recording(run, scope.recorders, name_of(bias), None, reason=REASON)
    return counting(run, scope.usages, NAMES[door])


def calling_with(made: Callable[[Tensor, Any], AttnBias | None], options: Options) -> Bound:
    """The same call with the bias that `made` makes of the query and the call's own; its choice is kept."""
    door, scale, softcap, dropout_p, return_lse, kernel = options

    def calling(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        bias = made(query, bias)
        return call(door, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)

    return marked(calling)


def counting(run: Bound, usages: tuple[Usage, ...], door: str) -> Bound:
    """`run`, whose calls are counted by kind of bias; itself where nobody counts."""
    if not usages:
        return run

    def counted(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        result = run(query, key, value, bias)
        for usage in usages:
            usage.add(door, bias)
        return result

    return _made_for(counted, getattr(run, "candidate", None), getattr(run, "problem", None))


def decide(scope: Scope, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | None, options: Options) -> Bound:
    """The function that runs this call, and every other that looks the same."""
    door, scale, softcap, dropout_p, return_lse, kernel = options
    if door != ATTENTION:
        refuse_pages(bias)
        check_tensors(query, key, value)
        reason = what_is_foreign(query, key, value)
        if reason is not None:
            return handed_to_torch(scope, door, scale, dropout_p, reason)
        folding = broadcasting(query, key, value, door == SDPA_GQA)
        if folding is not None:
            fold, unfold = folding
            query, key, value, bias = fold(query, key, value, bias)
            inner = decide(scope, query, key, value, bias, (SDPA_GQA, *options[1:]))

            def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
                return unfold(inner(*fold(query, key, value, bias)))

            return _made_for(run, inner.candidate, inner.problem)  # type: ignore[attr-defined]

    cast_to = autocast_of(query)
    if cast_to is not None:
        query, key, value = (as_under_autocast(tensor, cast_to) for tensor in (query, key, value))
    heads = heads_of(door)
    problem, bound = examine(query, key, value, bias, scale, softcap, dropout_p, return_lse, heads)
    seen = with_plain_lengths(problem)
    candidate = choose(registry, seen, scope.settings, kernel)
    run_of_kernel = registry.run(candidate.kernel)
    bound_call = bind(
        run_of_kernel, layout_of(candidate.kernel), candidate.steps, problem, bound, heads, candidate.kernel.prepare
    )
    if candidate.kernel.calls_sdpa:
        bound_call = marked(bound_call)
    if isinstance(bound, TensorBias) and not isinstance(bias, TensorBias):  # a sum, say, whose mask masks nothing here
        bound_call = simplified(bound_call, bound.bound_lengths())
    if cast_to is not None:
        bound_call = under_autocast(bound_call, query.device.type, cast_to)
    if scope.recorders:
        bound_call = recording(bound_call, scope.recorders, candidate.kernel.name, seen, candidate.adaptations)
    return _made_for(bound_call, candidate, seen)


def asked(
    door: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Problem:
    """The problem that a call would put to the kernels. Raises what the call would raise."""
    bias = by_its_rule(as_bias(bias), query, "explain")
    if door != ATTENTION:
        refuse_pages(bias)
        check_tensors(query, key, value)
    if door != ATTENTION and what_is_foreign(query, key, value) is None:
        folding = broadcasting(query, key, value, door == SDPA_GQA)
        if folding is not None:
            query, key, value, bias = folding[0](query, key, value, bias)
    cast_to = autocast_of(query)
    if cast_to is not None:
        query, key, value = (as_under_autocast(tensor, cast_to) for tensor in (query, key, value))
    problem, _ = examine(query, key, value, bias, scale, softcap, dropout_p, return_lse, heads_of(door))
    return with_plain_lengths(problem)


def heads_of(door: int) -> int:
    """The dimension of the heads at this door."""
    return HEADS_LAST if door == ATTENTION else HEADS_FIRST


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast is on for on this device type; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_of(query: object) -> torch.dtype | None:
    """The dtype that operands are cast to; None where autocast leaves them alone."""
    if not isinstance(query, Tensor) or not query.is_floating_point():
        return None
    device = query.device.type
    return autocast_dtype(device) if _has_autocast(device) else None


@constant
def _has_autocast(device: str) -> bool:
    return torch.amp.autocast_mode.is_autocast_available(device)


def as_under_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` cast as autocast casts: floating ones, but float64 never."""
    castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if castable else tensor


def _made_for(run: Bound, candidate: Candidate | None, problem: Problem | None) -> Bound:
    run.candidate = candidate  # type: ignore[attr-defined]
    run.problem = problem  # type: ignore[attr-defined]
    return run


def what_is_foreign(*operands: object) -> str | None:
    """What the core does not model among the operands; None where all are plain tensors (or no tensors at all)."""
    for operand in operands:
        reason = foreign(operand) if isinstance(operand, Tensor) else None
        if reason is not None:
            return reason
    return None


def handed_to_torch(scope: Scope, door: int, scale: float | None, dropout_p: float, reason: str) -> Bound:
    """The stock path, for what the core does not model; `record` says so. Raises where a strict scope forbids it."""
    check_strict(STOCK, reason, scope.settings.only)

    def stock(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return stock_sdpa(door, query, key, value, bias, scale, dropout_p, reason)

    run = marked(stock)
    if scope.recorders:
        run = recording(run, scope.recorders, STOCK, None, reason=reason)
    return _made_for(run, None, None)


def stock_sdpa(
    door: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | None,
    scale: float | None,
    dropout_p: float,
    reason: str,
) -> Tensor:
    """torch's own scaled_dot_product_attention. Raises InputTypeError for a bias that it has no words for."""
    mask, is_causal = None, False
    if isinstance(bias, Causal) and bias.corner == "top-left":
        is_causal = True
    elif isinstance(bias, TensorBias):
        mask = bias.tensor
    elif bias is not None:
        raise InputTypeError(f"attn_mask: {bias!r} is not for {reason}, which goes to torch unchanged")
    return _stock_sdpa(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=door == SDPA_GQA)


def explain_failure(run: Bound, error: Exception) -> None:
    """Names the kernel and the problem in an error that a kernel raised, and remembers it; its type stays."""
    candidate: Candidate | None = getattr(run, "candidate", None)
    if candidate is None or isinstance(error, AttnError):
        return
    registry.note_failure(candidate.kernel, error)
    note = f"raised by kernel {candidate.kernel.name!r} on: {run.problem}"  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):  # Python 3.10
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
