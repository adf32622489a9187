"""explain(): which kernel would run a call, and why not each of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import known_bad
from .bias import AttnBias, as_bias
from .by_methods import REASON, check_options, name_of
from .dispatch import ATTENTION, SDPA, SDPA_GQA, asked
from .errors import InputError, NoKernelError
from .problem import Problem
from .registry import registry
from .scope import Settings, current
from .select import Candidate, consider, left_out, matches, rank

if TYPE_CHECKING:
    from rich.table import Table


OWN_DISPATCH = "note: the bias brings its own call, so no kernel is asked; the problem is shown without it"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One kernel's answer to a problem.

    `state`: "chosen", "ready" (takes it, another was better), "refused", "absent", "broken", "unavailable" or "failed"
    (takes it, though its last run raised).
    """

    kernel: str
    state: str
    reasons: tuple[str, ...] = ()
    refused_fields: tuple[str, ...] = ()
    adaptations: tuple[str, ...] = ()
    seconds: float | None = None  #: estimated, adaptations included
    source: str = ""  #: where the estimate's constants come from
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Data first: iterate it, or read `chosen`, `verdicts` and `problem`; print it for a table."""

    problem: Problem
    verdicts: tuple[Verdict, ...]  #: the chosen kernel first, then those that take the problem, by rank
    prefer: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()  #: patterns of the strict scope in force; empty: every kernel may run

    @property
    def chosen(self) -> str | None:
        """The kernel that would run; None where none takes the problem."""
        first = self.verdicts[0] if self.verdicts else None
        return first.kernel if first is not None and first.state == "chosen" else None

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __getitem__(self, kernel: str) -> Verdict:
        for verdict in self.verdicts:
            if verdict.kernel == kernel:
                return verdict
        raise KeyError(kernel)

    def raise_if_refused(self) -> None:
        """Raises NoKernelError where nothing takes the problem."""
        if self.chosen is None:
            raise NoKernelError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "problem": str(self.problem),
            "chosen": self.chosen,
            "prefer": list(self.prefer),
            "strict": list(self.strict),
            "notes": list(self.notes),
            "verdicts": [
                {
                    "kernel": v.kernel,
                    "state": v.state,
                    "reasons": list(v.reasons),
                    "refused_fields": list(v.refused_fields),
                    "adaptations": list(v.adaptations),
                    "seconds": v.seconds,
                    "source": v.source,
                    "fix": v.fix,
                }
                for v in self.verdicts
            ],
        }

    def __str__(self) -> str:
        lines = [f"problem: {self.problem}"]
        if self.prefer:
            lines.append(f"prefer: {', '.join(self.prefer)}")
        if self.strict:
            lines.append(f"strict: {', '.join(self.strict)}")
        for verdict in self.verdicts:
            lines.append(f"{verdict.kernel:<18} {verdict.state:<12} {_detail(verdict)}".rstrip())
        return "\n".join([*lines, *self.notes])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text  # what is in brackets, as in attn-flash[fa2], is no style

        notes = Text("\n".join(self.notes)) if self.notes else None
        table = Table(title=Text(str(self.problem)), title_justify="left", caption=notes)
        table.add_column("kernel", no_wrap=True)
        table.add_column("state")
        table.add_column("estimate", justify="right", no_wrap=True)
        table.add_column("why")
        styles = {"chosen": "bold green", "ready": "", "refused": "dim", "failed": "red", "broken": "red"}
        for verdict in self.verdicts:
            why = Text("\n".join(_why(verdict)))
            style = styles.get(verdict.state, "dim")
            table.add_row(verdict.kernel, verdict.state, _time(verdict), why, style=style)
        return table


def explain(
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
) -> Explanation:
    """What `attention` would do with these arguments, without running it.

    Args:
        layout: "heads-last" as in `attention`, or "heads-first" as in `scaled_dot_product_attention`, for which
            `enable_gqa` is, too. Other arguments are those of `attention`; meta tensors will do.

    Raises what the call itself would raise for arguments that do not fit together; a kernel that refuses is no error
    here, but a verdict.
    """
    door = door_of(layout, enable_gqa)
    given = as_bias(bias)
    if given is not None and given.by_methods and not given.needs_materialization():
        check_options(given, softcap, return_lse, kernel)
        only = current.get().settings.only
        problem = asked(door, query, key, value, None, scale, None, dropout_p, False)
        verdict = Verdict(kernel=name_of(given), state="chosen", reasons=(REASON,))
        if only and not matches(verdict.kernel, only):
            reason = str(left_out(only))
            verdict = Verdict(kernel=verdict.kernel, state="refused", reasons=(reason,), refused_fields=("strict",))
        return Explanation(problem=problem, verdicts=(verdict,), notes=(OWN_DISPATCH,), strict=only)
    problem = asked(door, query, key, value, bias, scale, softcap, dropout_p, return_lse)
    return explain_problem(problem, kernel=kernel)


def explain_problem(problem: Problem, *, kernel: str | None = None) -> Explanation:
    """The same for a problem without tensors; `kernel` insists on one, as in `attention`."""
    return weighed(problem, current.get().settings, kernel)


def door_of(layout: str, enable_gqa: bool) -> int:
    """The door that a caller with this layout comes through. Raises InputError for another layout."""
    if layout == "heads-last":
        return ATTENTION
    if layout == "heads-first":
        return SDPA_GQA if enable_gqa else SDPA
    raise InputError(f'layout: must be "heads-last" or "heads-first", got {layout!r}')


def weighed(problem: Problem, settings: Settings, kernel: str | None) -> Explanation:
    """Every kernel's answer under these settings; that of `kernel` alone where the caller insists on it."""
    if kernel is not None:
        candidates = [consider(registry, registry.kernel(kernel), problem, settings)]
    else:
        candidates = rank(registry, problem, settings)
    return Explanation(
        problem=problem,
        verdicts=tuple(_verdict(candidate, first=i == 0) for i, candidate in enumerate(candidates)),
        prefer=settings.prefer,
        strict=settings.only,
        notes=_notes(problem, candidates),
    )


def _verdict(candidate: Candidate, *, first: bool) -> Verdict:
    state: str = candidate.state
    if candidate.takes and first:
        state = "chosen"
    reasons = candidate.reasons()
    if candidate.reason and candidate.state == state:  # the state is a column of its own
        reasons = (candidate.reason,)
    source = candidate.kernel.cost(candidate.problem.device).source if candidate.takes else ""
    return Verdict(
        kernel=candidate.kernel.name,
        state=state,
        reasons=reasons,
        refused_fields=tuple(refusal.field for refusal in candidate.refusals),
        adaptations=candidate.adaptations,
        seconds=candidate.seconds,
        source=source,
        fix=candidate.fix,
    )


def _notes(problem: Problem, candidates: list[Candidate]) -> tuple[str, ...]:
    notes = []
    if problem.is_cuda and problem.compute_capability is None:
        notes.append("note: compute capability unknown here; chosen among kernels without a limit")
    sources = {c.kernel.cost(problem.device).source for c in candidates if c.takes}
    if "prior" in sources:
        notes.append("note: ~ marks an estimate from constants that were not measured on such a device")
    calibrated = [c.kernel.name for c in candidates if c.takes and _is_calibrated(c.kernel.cost(problem.device).source)]
    if calibrated:
        notes.append(f"note: calibrated on this machine: the constants of {', '.join(calibrated)}")
    for candidate in candidates:
        if candidate.takes:  # so whatever is known of it here was overruled
            bad = known_bad.refusals(candidate.kernel.name, candidate.problem)
            notes += [f"note: {candidate.kernel.name} is allowed, although {refusal}" for refusal in bad]
    return tuple(notes)


def _is_calibrated(source: str) -> bool:
    return source.startswith("calibrated")


def _time(verdict: Verdict) -> str:
    if verdict.seconds is None:
        return ""
    about = "" if verdict.source not in ("prior", "undeclared") else "~"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if verdict.seconds * factor >= 1.0:
            return f"{about}{verdict.seconds * factor:.3g} {unit}"
    return f"{about}{verdict.seconds * 1e6:.3g} µs"


def _detail(verdict: Verdict) -> str:
    parts = [_time(verdict)] if verdict.seconds is not None else []
    return "; ".join([*parts, *_why(verdict)])


def _why(verdict: Verdict) -> list[str]:
    """What is done to the operands first, why it does not take the problem, and what to type about it."""
    after = [f"after {', '.join(verdict.adaptations)}"] if verdict.adaptations else []
    return [*after, *verdict.reasons, *([f"to type: {verdict.fix}"] if verdict.fix else [])]
