"""What the author of a kernel knows to fail, each with its reason.

Strict: what is listed must fail, and must be there, so that no list outlives its reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import InputError
from .results import CheckResult


class ExpectedFailures:
    """Check, or "check[case]" -> why it fails."""

    def __init__(self, reasons: Mapping[str, str] | None = None) -> None:
        self._reasons = dict(reasons or {})

    def must_fit(self, rows: Iterable[tuple[str, str]]) -> None:
        """Raises InputError for a name that fits none of the rows, each a check's name and the row's own."""
        unknown = set(self._reasons).difference(*rows)
        if unknown:
            raise InputError(f"expected_failures: no check is named {', '.join(sorted(unknown))}")

    def reason(self, check: str, row: str) -> str | None:
        """Why a row is known to fail; None where it is not. Its own name is looked for before its check's."""
        return self._reasons.get(row, self._reasons.get(check))

    def judged(self, result: CheckResult) -> CheckResult:
        """The result as it counts: "xfailed" where it fails as expected, "failed" where it ought to and does not."""
        why = self.reason(result.check, result.name)
        if why is None or result.status == "skipped":
            return result
        if result.status == "failed":
            return replace(result, status="xfailed", reason=f"{why} ({result.reason})")
        return replace(result, status="failed", reason=f"it holds, and is in expected_failures: {why}")
