"""The list of checks. Each is one function: it returns where the kernel is right, and raises where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import InputError, suggestion
from .cases import Case
from .subject import Subject

#: Raises where the kernel is wrong; may answer the largest error as a part of what is allowed.
Run = Callable[[Subject, Case], float | None]
Cases = Callable[[Subject], Iterable[Case]]
_Run = TypeVar("_Run", bound=Run)


@dataclass(frozen=True)
class Check:
    """One rule that a kernel must keep.

    `fields` are the fields of Capabilities and Backward whose declaration it holds a kernel to.
    """

    name: str
    group: str  #: "numbers", "honesty", "contract" or "manners"
    about: str
    fields: frozenset[str]
    cases: Cases
    run: Run


CHECKS: dict[str, Check] = {}


def check(group: str, cases: Cases, fields: Iterable[str] = ()) -> Callable[[_Run], _Run]:
    """Makes a function a check of that name."""

    def add(run: _Run) -> _Run:
        about = (run.__doc__ or "").strip().partition("\n")[0]
        CHECKS[run.__name__] = Check(run.__name__, group, about, frozenset(fields), cases, run)
        return run

    return add


def must_be_known(name: str | None) -> None:
    """Raises InputError for what is the name of no check; None names none."""
    if name is not None and name not in CHECKS:
        near = suggestion(name, CHECKS) if isinstance(name, str) else ""
        raise InputError(f"only: no check is named {name!r}.{near} There are {', '.join(CHECKS)}")


def once(subject: Subject) -> list[Case]:
    """A check that has but one case: the plain problem."""
    return [Case(label="", problem=subject.base)]


def taken(subject: Subject) -> list[Case]:
    """Every case that the kernel takes, with those that its own limits refuse (reported as such)."""
    return subject.claimed


def a_few(subject: Subject) -> list[Case]:
    """One plain case, and one for each kind of bias that is declared."""
    kinds: dict[object, Case] = {}
    for case in subject.taken:
        if case.label.startswith("bias "):
            kinds.setdefault(type(case.problem.bias), case)
    trained = replace(subject.base, requires_grad=True)
    plain = trained if subject.takes(trained) else subject.base
    return [Case(label="no bias", problem=plain), *kinds.values()]
