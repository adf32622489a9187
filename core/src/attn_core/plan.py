"""plan(): a choice made once, for calls in a loop.

A plan skips the lookup, not the meaning: it checks that shapes, dtype, device and layout are those that it was made
for. `unchecked=True` skips that as well, and carries the precondition in its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .bias import AttnBias, as_bias
from .dispatch import counting, decide, explain_failure
from .door import check_tensors
from .errors import InputTypeError, PlanError
from .explain import Explanation, door_of, weighed
from .kernel import Bound
from .problem import Problem
from .recognise import recogniser
from .record import recording
from .scope import Settings, current, scope_for

_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch.compiler.is_dynamo_compiling
_current = current.get


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: AttnBias | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    kernel: str | None = None,
    layout: str = "heads-last",
    enable_gqa: bool = False,
    unchecked: bool = False,
) -> Plan | Bound:
    """Chooses now, for calls with operands like these.

    Args:
        layout: "heads-last" as in `attention`, or "heads-first" as in `scaled_dot_product_attention`, for which
            `enable_gqa` is, too. Other arguments are those of `attention`.
        unchecked: return the bare function `(query, key, value, bias)`. Precondition: operands of the very shapes,
            strides, dtype, device and requires_grad given here. With others it may read out of bounds. `record` does
            not see its calls.

    Raises what `attention` raises.
    """
    door = door_of(layout, enable_gqa)
    given = as_bias(bias)
    if given is not None and given.by_methods:
        raise InputTypeError(
            f"plan: {type(given).__name__} is asked anew at every call, by its methods; call attention, or plan with"
            " TensorBias(bias.materialize(device))"
        )
    settings = current.get().settings
    # A scope without the recorders that are open now: a plan outlives them, and asks at each call who listens.
    options = door, scale, softcap, dropout_p, return_lse, kernel
    run = decide(scope_for(settings), query, key, value, given, options)
    if getattr(run, "candidate", None) is None:
        raise InputTypeError("plan: takes plain tensors; what the core does not model goes to torch call by call")
    if not query.dtype is key.dtype is value.dtype:
        raise InputTypeError("plan: takes operands of one dtype; cast them as autocast would, then plan")
    if unchecked:
        return run
    expected = _seen(query, key, value)
    # A guard object sees requires_grad, but not whether gradients are on.
    mode = _is_grad_enabled() if query.requires_grad or key.requires_grad or value.requires_grad else None
    check = recogniser([query, key, value])
    return Plan(run, given, expected, check, mode, settings, kernel)


class Plan:
    """A kernel bound to a problem: `plan(query, key, value)` runs it.

    A bias is part of a plan. One that holds data may be given anew, with the same shape, dtype and device. A plan may
    be called in a function that torch.compile takes whole; its kernel stays the one that it was made with.
    """

    __slots__ = (
        "_bias",
        "_bias_key",
        "_check",
        "_expected",
        "_insisted",
        "_mode",
        "_no_graph",
        "_run",
        "_settings",
        "kernel",
        "problem",
    )

    def __init__(
        self,
        run: Bound,
        bias: AttnBias | None,
        expected: tuple[Any, ...],
        check: Callable[..., bool],
        mode: bool | None,
        settings: Settings,
        insisted: str | None,
    ) -> None:
        self._run = run
        self._settings = settings
        self._insisted = insisted
        self._bias = bias
        self._bias_key = None if bias is None else bias.key
        self._expected = expected
        self._check = check
        self._mode = mode
        self.kernel: str = run.candidate.kernel.name  # type: ignore[attr-defined]
        self.problem: Problem = run.problem  # type: ignore[attr-defined]
        seen = replace(run.candidate.problem, compiling=True)  # type: ignore[attr-defined]
        self._no_graph = "; ".join(map(str, run.candidate.kernel.refusals(seen)))  # type: ignore[attr-defined]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | Tensor | None = None) -> Any:
        """Runs the plan. Raises PlanError for operands other than it was made for, InputTypeError for no tensors."""
        if _is_tracing():
            return self._in_graph(query, key, value, bias)
        # What the guard object does not recognise may fit all the same: it minds whether autocast is on, for one.
        recognised = (self._mode is None or self._mode is _is_grad_enabled()) and self._check(query, key, value)
        if not recognised:
            check_tensors(query, key, value)
            if _seen(query, key, value) != self._expected:
                self._refuse(query, key, value)
        bias = self._bias if bias is None else self._given(bias)
        try:
            if _current().watched:
                return self._watched()(query, key, value, bias)
            return self._run(query, key, value, bias)
        except Exception as error:
            explain_failure(self._run, error)
            raise

    def _in_graph(self, query: Tensor, key: Tensor, value: Tensor, bias: AttnBias | Tensor | None) -> Any:
        """The same where a graph is traced: operands are compared then, which guards them in every call of the graph.

        `record` does not see it, as a plan chooses nothing.
        """
        check_tensors(query, key, value)
        if self._no_graph:
            raise PlanError(f"plan: {self.kernel} cannot be part of a graph ({self._no_graph}); call attention there")
        if _seen(query, key, value) != self._expected:
            raise PlanError("plan: the operands in this graph are not those it was made for; make another plan")
        return self._run(query, key, value, self._bias if bias is None else self._given(bias))

    def explain(self) -> Explanation:
        """What was chosen, and why not the others, by the settings under which the plan was made."""
        return weighed(self.problem, self._settings, self._insisted)

    def __repr__(self) -> str:
        return f"<Plan: {self.kernel} for {self.problem}>"

    def _watched(self) -> Bound:
        scope = _current()
        adaptations = self._run.candidate.adaptations  # type: ignore[attr-defined]
        run = recording(self._run, scope.recorders, self.kernel, self.problem, adaptations)
        return counting(run, scope.usages, "plan")

    def _given(self, bias: AttnBias | Tensor) -> AttnBias | None:
        given = as_bias(bias)
        if given is None or given.key != self._bias_key:
            raise PlanError(f"plan: made for bias {self._bias!r}, got {given!r}; make another plan")
        return given

    def _refuse(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        lines = [
            f"  {name}: made for {_told(want)}, got {_told(got)}"
            for name, want, got in zip(_SEEN, self._expected, _seen(query, key, value))
            if want != got
        ]
        raise PlanError("\n".join(["plan: these operands are not those it was made for; make another plan", *lines]))


def _told(seen: object) -> object:
    """What `_seen` saw, for people."""
    return list(seen) if isinstance(seen, torch.Size) else seen


_SEEN = (
    "query.shape",
    "key.shape",
    "value.shape",
    "query.dtype",
    "key.dtype",
    "value.dtype",
    "query.device",
    "key.device",
    "value.device",
    "requires_grad",
    "query.stride",
    "key.stride",
    "value.stride",
)


def _seen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """What a plan checks, in the order of `_SEEN`."""
    operands = (query, key, value)
    return (
        *(tensor.shape for tensor in operands),
        *(tensor.dtype for tensor in operands),
        *(tensor.device for tensor in operands),
        _is_grad_enabled() and any(tensor.requires_grad for tensor in operands),
        *("contiguous" if tensor.is_contiguous() else tensor.stride() for tensor in operands),
    )
