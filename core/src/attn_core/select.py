"""Choosing: which kernels take a problem, how, at what estimated cost, and in which order.

    kernel= in the call  >  prefer scopes, then ATTN_PREFER  >  estimated seconds  >  name

A call considers the kernels for its device; the others would be refused, and their probes may import a library for
seconds, or start CUDA where nobody uses it. Where somebody asks why, every kernel is considered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from . import known_bad
from .adapt import ADAPTATIONS, Adaptation
from .calling_module import in_its_module
from .capabilities import Refusal
from .cost import Terms
from .errors import KernelRefusedError, NoKernelError
from .kernel import Kernel
from .problem import Problem
from .registry import Registry, State
from .scope import Settings
from .tracing import constant


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One kernel, considered for one problem.

    `state` is "ready" where it takes the problem, else why not: a state of the kernel, or "refused". A kernel whose
    last run raised is "failed", and still takes problems (`takes` is what counts).
    """

    kernel: Kernel
    state: State
    reason: str = ""
    fix: str | None = None
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[tuple[Adaptation, Problem], ...] = ()  #: adaptations, each with the problem that it makes
    problem: Problem  #: as the kernel sees it, after the adaptations
    terms: Terms | None = None  #: the estimate, adaptations included; None where it does not take the problem
    seconds: float | None = None  #: the same for the problem's lengths
    preferred: int | None = None  #: place of the first pattern of the scope that names it

    @property
    def takes(self) -> bool:
        return self.terms is not None

    @property
    def adaptations(self) -> tuple[str, ...]:
        return tuple(adaptation.name for adaptation, _ in self.steps)

    def reasons(self) -> tuple[str, ...]:
        """Why it does not take the problem, a line each."""
        if self.refusals:
            return tuple(map(str, self.refusals))
        return (f"{self.state}: {self.reason}",) if self.reason else ()


def with_plain_lengths(problem: Problem) -> Problem:
    """The problem with the sizes at hand in place of symbolic ones, as an estimate needs them.

    Where a graph is exported by running Python on fake tensors, comparing symbolic estimates would add guards that
    break a bounded dimension; the choice is made for the example's sizes.
    """
    batch, seqlen_q, seqlen_kv = _plain(problem.batch), _plain(problem.seqlen_q), _plain(problem.seqlen_kv)
    bias = problem.bias
    if bias is not None:
        symbolic = {name: tensor for name, tensor in bias.held().items() if _is_symbolic(*tensor.shape)}
        if symbolic:  # compared with the lengths, its sizes would add guards, too
            bias = bias.with_held({name: _with_plain_sizes(tensor) for name, tensor in symbolic.items()})
        if _is_symbolic(*bias.bound_lengths()):
            bias = bias.at((seqlen_q, seqlen_kv))
    return replace(problem, batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, bias=bias)


def _is_symbolic(*sizes: Any) -> bool:
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _with_plain_sizes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without data that looks as `tensor` does at the sizes at hand."""
    shape, stride = ([_plain(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)


def _plain(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def consider(
    registry: Registry, kernel: Kernel, problem: Problem, settings: Settings, *, limits: bool = True
) -> Candidate:
    """Whether and how `kernel` takes `problem`.

    Without `limits` the lengths are stand-ins: its own `refuse` is left to be asked later, and what is known to be bad
    at some lengths counts for all.
    """
    condition = registry.condition(kernel)
    preferred = next((i for i, p in enumerate(settings.prefer) if fnmatchcase(kernel.name, p)), None)
    if condition.state not in ("ready", "failed"):
        return Candidate(
            kernel=kernel,
            state=condition.state,
            reason=condition.reason,
            fix=condition.fix,
            problem=problem,
            preferred=preferred,
        )
    refusals = kernel.refusals(problem, limits=limits)
    adapted, steps, extra = problem, [], Terms()
    for adaptation in ADAPTATIONS:
        if not refusals:
            break
        if any(refusal.field in adaptation.fields for refusal in refusals):
            after = adaptation.rewrite(adapted, kernel.declaration(adapted))
            if after is not None:
                extra = extra.plus(adaptation.terms(adapted, after, registry.rates(problem.device)))
                steps.append((adaptation, after))
                adapted = after
                refusals = kernel.refusals(adapted, limits=limits)
    terms, reason = _estimated(kernel, adapted) if not refusals else (None, None)
    if reason is not None:
        refusals = [reason]
    if kernel.declaration(problem).numerics == "approximate" and "approximate" not in settings.allow:
        text = 'is approximate; allowed within `with allow("approximate")` or by ATTN_ALLOW=approximate'
        refusals = [*refusals, Refusal("numerics", text)]
    if settings.only and not matches(kernel.name, settings.only):
        refusals = [*refusals, left_out(settings.only)]
    if not refusals and not known_bad.overruled(kernel.name, settings):
        refusals = known_bad.refusals(kernel.name, adapted, lengths=limits)
    if refusals:
        # The reasons that the caller reads are those for the call as it was written.
        unadapted = kernel.refusals(problem, limits=limits)
        solvable = {field for adaptation, _ in steps for field in adaptation.fields}
        shown = [r for r in unadapted if r.field not in solvable or any(r.field == s.field for s in refusals)]
        shown += [r for r in refusals if all(r.field != s.field for s in shown)]
        return Candidate(kernel=kernel, state="refused", refusals=tuple(shown), problem=problem, preferred=preferred)
    assert terms is not None
    terms = terms.plus(extra)
    return Candidate(
        kernel=kernel,
        state=condition.state,
        reason=condition.reason,
        steps=tuple(steps),
        problem=adapted,
        terms=terms,
        seconds=terms.seconds(adapted),
        preferred=preferred,
    )


def _estimated(kernel: Kernel, problem: Problem) -> tuple[Terms | None, Refusal | None]:
    """The kernel's estimate; where its own `work` raises, that is a reason not to take it, not to fail the call."""
    try:
        return kernel.terms(problem), None
    except Exception as error:
        if kernel.work is None:
            raise
        return None, Refusal("work", f"its own count of pairs raised {type(error).__name__}: {error}")


def rank(
    registry: Registry, problem: Problem, settings: Settings, *, limits: bool = True, every: bool = True
) -> list[Candidate]:
    """The kernels, those that take the problem first, the best of them at the top.

    Without `every`, only those for the problem's device; the probes of the others are not asked.
    """
    kernels = [kernel for kernel in registry.kernels() if every or kernel.is_for_device_of(problem)]
    found = [consider(registry, kernel, problem, settings, limits=limits) for kernel in kernels]
    registry.say_what_is_missing()
    last = len(settings.prefer)

    def order(candidate: Candidate) -> tuple[bool, int, float, str]:
        place = last if candidate.preferred is None else candidate.preferred
        return not candidate.takes, place, candidate.seconds or 0.0, candidate.kernel.name

    return sorted(found, key=order)


def choose(
    registry: Registry, problem: Problem, settings: Settings, forced: str | None = None, *, limits: bool = True
) -> Candidate:
    """The kernel that runs `problem`.

    Raises UnknownKernelError or KernelRefusedError where the caller insists on one by name, KernelRefusedError where a
    strict scope insists on some and none of these takes the problem, else NoKernelError where none takes it.
    """
    if forced is not None:
        candidate = consider(registry, registry.kernel(forced), problem, settings, limits=limits)
        if not candidate.takes:
            raise KernelRefusedError(f"{told(candidate)}\nThe problem: {problem}")
        return candidate
    candidates = rank(registry, problem, settings, limits=limits, every=False)
    if not candidates or not candidates[0].takes:
        candidates = rank(registry, problem, settings, limits=limits)
        if settings.only:
            raise KernelRefusedError(in_its_module(_none_of(settings.only, problem, candidates)))
        reasons = "\n".join(told(candidate) for candidate in candidates) or "no kernel is registered"
        raise NoKernelError(in_its_module(f"no kernel takes this problem: {problem}\n{reasons}"))
    return candidates[0]


def told(candidate: Candidate) -> str:
    """A refusal for people: the kernel, then one line per reason."""
    if candidate.refusals:
        head = f"kernel {candidate.kernel.name!r} refuses this problem:"
        return "\n".join([head, *(f"  {reason}" for reason in candidate.reasons())])
    fix = f" ({candidate.fix})" if candidate.fix else ""
    return f"kernel {candidate.kernel.name!r} is {candidate.state}: {candidate.reason}{fix}"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any of the patterns names it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def left_out(only: tuple[str, ...]) -> Refusal:
    """Why a kernel that takes a problem may not run within a strict scope."""
    return Refusal("strict", f"is left out by {strict_scope(only)}")


def strict_scope(only: tuple[str, ...]) -> str:
    """A strict scope, as it is written."""
    return f"prefer({', '.join(map(repr, only))}, strict=True)"


def _none_of(only: tuple[str, ...], problem: Problem, candidates: list[Candidate]) -> str:
    """Why no kernel that a strict scope lets run takes the problem, and what to do."""
    insisted = [candidate for candidate in candidates if matches(candidate.kernel.name, only)]
    others = [
        candidate.kernel.name
        for candidate in candidates
        if candidate.refusals and all(refusal.field == "strict" for refusal in candidate.refusals)
    ]
    reasons = [told(candidate) for candidate in insisted] or ["no kernel matches; `attn kernels` lists all"]
    free = [f"Without strict, {', '.join(others)} would take it."] if others else []
    return "\n".join([f"{strict_scope(only)}: none of these takes this problem: {problem}", *reasons, *free])


@constant
def check_strict(name: str, reason: str, only: tuple[str, ...]) -> None:
    """Raises KernelRefusedError where a strict scope does not let `name` run, which is no kernel of the registry."""
    if only and not matches(name, only):
        raise KernelRefusedError(
            in_its_module(
                f"{strict_scope(only)}: this call would go to {name!r} ({reason}), past every kernel; leave strict out,"
                f" or add {name!r} to the patterns"
            )
        )
