"""Runs the checks: every one on every one of its cases, a result each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping

from ..errors import InputTypeError
from ..kernel import Kernel
from ..registry import registry
from . import contract, honesty, manners, numbers, recorded  # noqa: F401  (importing them makes their checks known)
from .cases import Case
from .checks import CHECKS, Check, must_be_known
from .expected import ExpectedFailures
from .results import CheckFailed, CheckResult, NotTestable, Status
from .subject import Subject, allowed, must_be_a_type, registered

Progress = Callable[[CheckResult], None]


def check_kernel(
    kernel: Kernel | str,
    *,
    device: str = "cpu",
    only: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    stop_at_failure: bool = False,
    progress: Progress | None = None,
) -> list[CheckResult]:
    """Holds a kernel to what it declares, and to the contract that all keep.

        results = check_kernel("hello/sdpa")
        assert all(results), "\\n".join(str(result) for result in results if not result)

    Args:
        kernel: its name, or the kernel itself; one that is not registered is, meanwhile.
        device: device type on which it is checked.
        only: name of the one check to run.
        expected_failures: check, or "check[case]" -> why it fails. Its status is "xfailed" where it does, and "failed"
            where it holds, so that the list cannot outlive its reasons.
        stop_at_failure: leave out what comes behind the first failure.
        progress: called with each result as it comes.

    Returns:
        A result per check and case; false where it failed. A kernel that crashes takes this process with it: `attn
        check` runs them in one of their own.

    Raises UnknownKernelError for an unknown name, InputError for an unknown check, case or type of device,
    InputTypeError for what is no kernel.
    """
    if isinstance(kernel, str):
        kernel = registry.kernel(kernel)
    if not isinstance(kernel, Kernel):
        raise InputTypeError(f"kernel: takes a Kernel or the name of one, got {kernel!r}")
    must_be_known(only)
    must_be_a_type(device)
    with registered(kernel), allowed(kernel):
        subject, results = Subject(kernel, device), []
        expected = ExpectedFailures(expected_failures)
        if expected_failures:
            expected.must_fit((check.name, name_of(check, case)) for check, case in every_case(subject))
        for check, case in every_case(subject, only):
            results.append(expected.judged(result_of(subject, check, case)))
            if progress is not None:
                progress(results[-1])
            if stop_at_failure and not results[-1]:
                break
        return results


def every_case(subject: Subject, only: str | None = None) -> Iterator[tuple[Check, Case | CheckResult]]:
    """Each check with each of its cases; a result instead where its cases cannot be made.

    The kernel is weighed first, as before any call: some declare more exactly once their library is imported.
    """
    registry.condition(subject.kernel)
    for check in [CHECKS[only]] if only is not None else CHECKS.values():
        try:
            cases = list(check.cases(subject))
        except NotTestable as said:
            yield check, _result(subject, check, None, "skipped", str(said))
        except Exception as error:
            yield check, _result(subject, check, None, "failed", f"its cases cannot be made: {_told(error)}")
        else:
            yield from ((check, case) for case in cases)


def name_of(check: Check, case: Case | CheckResult) -> str:
    """The name of a row: "check[case]", or the check's where it has but one case."""
    label = case.case if isinstance(case, CheckResult) else case.label
    return f"{check.name}[{label}]" if label else check.name


def result_of(subject: Subject, check: Check, case: Case | CheckResult) -> CheckResult:
    """What one check says of one case."""
    if isinstance(case, CheckResult):
        return case
    started = time.perf_counter()
    status: Status = "passed"
    reason, error = "", None
    try:
        error = check.run(subject, case)
    except NotTestable as said:
        status, reason = "skipped", str(said)
    except CheckFailed as said:
        status, reason = "failed", str(said)
    except Exception as raised:
        status, reason = "failed", _told(raised)
    return _result(subject, check, case, status, reason, error, time.perf_counter() - started)


def _result(
    subject: Subject,
    check: Check,
    case: Case | None,
    status: Status,
    reason: str,
    error: float | None = None,
    seconds: float = 0.0,
) -> CheckResult:
    return CheckResult(
        kernel=subject.name,
        check=check.name,
        case="" if case is None else case.label,
        status=status,
        reason=reason,
        problem="" if case is None else str(case.problem),
        proves="" if case is None else case.proves,
        error=error,
        seconds=seconds,
    )


def _told(error: Exception) -> str:
    """The error, and where in the kernel it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
