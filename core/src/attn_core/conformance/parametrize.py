"""The checks as pytest's: one test per check and case, for the author of a kernel.

from attn_core.conformance import parametrize_kernel_checks

@parametrize_kernel_checks(["hello/sdpa"])
def test_kernel(check):
    check()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from ..kernel import Kernel
from ..registry import registry
from .cases import Case
from .checks import Check
from .expected import ExpectedFailures
from .results import CheckResult
from .run import every_case, name_of, result_of
from .subject import Subject, must_be_a_type, registered


@dataclass(frozen=True)
class Row:
    """One check of one kernel on one case; called, it is that test."""

    subject: Subject
    check: Check
    case: Case | CheckResult

    @property
    def name(self) -> str:
        return name_of(self.check, self.case)

    def __call__(self) -> None:
        with registered(self.subject.kernel):
            result = result_of(self.subject, self.check, self.case)
        if result.status == "skipped":
            pytest.skip(result.reason)
        assert result, f"{result}\nthe problem: {result.problem}"


def rows(kernels: Iterable[Kernel | str], device: str = "cpu") -> Iterator[Row]:
    """Every row of these kernels. Raises UnknownKernelError for an unknown name, InputError for such a device."""
    must_be_a_type(device)
    for given in kernels:
        kernel = registry.kernel(given) if isinstance(given, str) else given
        subject = Subject(kernel, device)
        with registered(kernel):
            found = list(every_case(subject))
        yield from (Row(subject, check, case) for check, case in found)


def parametrize_kernel_checks(
    kernels: Iterable[Kernel | str], *, device: str = "cpu", expected_failures: Mapping[str, str] | None = None
) -> Any:
    """A decorator that makes one test per check and case of a test function with the argument `check`.

    Args:
        kernels: names, or kernels.
        device: device type on which they are checked.
        expected_failures: check, or "check[case]" -> why it fails. Strict: one that passes is a failure, so that the
            list cannot outlive its reasons. A name that fits no row raises InputError.
    """
    found = list(rows(kernels, device))
    expected = ExpectedFailures(expected_failures)
    expected.must_fit((row.check.name, row.name) for row in found)
    parameters = []
    for row in found:
        reason = expected.reason(row.check.name, row.name)
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason is not None else []
        parameters.append(pytest.param(row, id=f"{row.subject.name} {row.name}", marks=marks))
    return pytest.mark.parametrize("check", parameters)
