"""What a check says: one row per check and case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped", "xfailed"]


class CheckFailed(AssertionError):  # noqa: N818
    """The kernel does not do what it declares, or what every kernel must."""


class NotTestable(Exception):  # noqa: N818  (says a state, not an error)
    """The check says nothing here, and why: another device is needed, for one."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check of one kernel on one case."""

    kernel: str
    check: str
    case: str  #: "" where the check has only one
    status: Status
    reason: str = ""  #: of every status but "passed"
    problem: str = ""  #: what was asked of the kernel, where it was asked anything
    proves: str = ""  #: what is declared and shown by it, such as "dtypes: bfloat16"
    error: float | None = None  #: the largest one, as a part of what the budget allows
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.check}[{self.case}]" if self.case else self.check

    def __bool__(self) -> bool:
        return self.status != "failed"

    def __str__(self) -> str:
        text = f"{self.kernel} {self.status} {self.name}"
        return f"{text}: {self.reason}" if self.reason else text

    def as_data(self) -> dict[str, Any]:
        return asdict(self)
