"""The path of a call: look the choice up; where it is new, check, choose, bind, and keep it.

The key holds everything that a capability or a kernel's memory safety depends on. Where every operand is a plain
tensor of one dtype and device, the function found under it can run without another look. All else (subclasses, mixed
dtypes, symbolic shapes) is never stored, and takes the slow way each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import recent
from .bias import AttnBias, Causal, TensorBias, as_bias
from .bind import bind, under_autocast
from .bind import heads_of as layout_of
from .broadcast import broadcasting
from .door import HEADS_FIRST, HEADS_LAST, examine, foreign
from .errors import AttnError, InputTypeError
from .kernel import Bound
from .problem import Problem
from .record import STOCK, recording
from .registry import registry
from .scope import Scope, current
from .select import Candidate, choose, with_plain_lengths
from .tracing import constant

_is_grad_enabled = torch.is_grad_enabled
_is_deterministic = torch._C._get_deterministic_algorithms
_is_any_autocast = torch._C._is_any_autocast_enabled
_stock_sdpa = torch._C._nn.scaled_dot_product_attention

#: Doors: who calls, and in which layout.
ATTENTION = 0  #: heads-last, four dimensions
SDPA = 1  #: heads-first, any leading dimensions
SDPA_GQA = 2  #: the same, with enable_gqa=True


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
    options = (
        door,
        scale,
        softcap,
        dropout_p,
        return_lse,
        kernel,
        _is_grad_enabled(),
        _is_deterministic(),
        forward_ad._current_level,
    )
    run: Any
    for check, kind, bias_key, seen, run in scope.recent:  # noqa: B007  (run is used after the loop)
        if seen == options:
            if kind is None:
                found = bias is None and check(query, key, value)
            elif kind is TensorBias:
                found = type(bias) is TensorBias and bias.lengths == bias_key and check(query, key, value, bias.tensor)
            else:
                found = type(bias) is kind and bias.key == bias_key and check(query, key, value)
            if found:
                break
    else:
        run, bias = _by_table(scope, options, query, key, value, bias)
    try:
        return run(query, key, value, bias)
    except Exception as error:
        explain_failure(run, error)
        raise


def _by_table(
    scope: Scope, options: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, bias: Any
) -> tuple[Bound, AttnBias | None]:
    """The function for a call that was not among those seen last, and its bias."""
    choice: Any
    run: Any
    try:
        dtype, device = query.dtype, query.device
        choice = (
            type(query) is type(key) is type(value) is Tensor
            and key.dtype is dtype
            and value.dtype is dtype
            and key.device == device
            and value.device == device,
            _is_any_autocast() and autocast_dtype(device.type),
            query.shape,
            key.shape,
            value.shape,
            dtype,
            device,
            query.requires_grad or key.requires_grad or value.requires_grad,
            query.is_contiguous() or query.stride(),
            key.is_contiguous() or key.stride(),
            value.is_contiguous() or value.stride(),
            None if bias is None else bias.key,
            options,
        )
        run = scope.get(choice)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, symbolic, or a foreign bias
        choice = run = None
    if run is None:
        bias = as_bias(bias)
        generation = registry.generation
        door, scale, softcap, dropout_p, return_lse, kernel, *_ = options
        run = decide(scope, door, query, key, value, bias, scale, softcap, dropout_p, return_lse, kernel)
        if choice is not None and choice[0]:
            if not choice[1]:  # a guard object tells that autocast is on, but not for which dtype
                run.entry = recent.entry(query, key, value, bias, options, run)
            scope.keep(choice, run, generation)
    elif run.entry is not None:
        scope.see(run.entry)
    return run, bias


def decide(
    scope: Scope,
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
) -> Bound:
    """The function that runs this call, and every other with the same key."""
    if door != ATTENTION:
        reason = what_is_foreign(query, key, value)
        if reason is not None:
            return handed_to_torch(scope, door, scale, dropout_p, reason)
        folding = broadcasting(query, key, value, door == SDPA_GQA)
        if folding is not None:
            fold, unfold = folding
            folded = fold(query, key, value, bias)
            inner = decide(scope, SDPA_GQA, *folded, scale, softcap, dropout_p, return_lse, kernel)

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
    bias = as_bias(bias)
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
    run.entry = None  # type: ignore[attr-defined]
    return run


def what_is_foreign(*operands: object) -> str | None:
    """What the core does not model among the operands; None where all are plain tensors (or no tensors at all)."""
    for operand in operands:
        reason = foreign(operand) if isinstance(operand, Tensor) else None
        if reason is not None:
            return reason
    return None


def handed_to_torch(scope: Scope, door: int, scale: float | None, dropout_p: float, reason: str) -> Bound:
    """The stock path, for what the core does not model; `record` says so."""

    def stock(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return stock_sdpa(door, query, key, value, bias, scale, dropout_p, reason)

    run: Bound = stock
    if scope.recorders:
        run = recording(stock, scope.recorders, STOCK, None, reason=reason)
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
