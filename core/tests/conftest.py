"""What a test has to say in the log, also where it runs in a worker process, whose own output is not shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest

SAID = "said"

if find_spec("numpy") is None:  # of which torch warns at import; what processes write to stderr is looked at
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Failed to initialize NumPy:UserWarning")


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a line for the end of the log: with the test's report it comes from a worker to the process that prints."""
    return lambda line: record_property(SAID, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    properties = {  # of one test's report; a test that fails and errs has two, with the same lines
        report.nodeid: [line for name, line in report.user_properties if name == SAID]
        for report in reports
        if getattr(report, "when", None) == "call"
    }
    for nodeid, lines in properties.items():
        if lines:
            terminalreporter.section(f"{nodeid} says", sep="-")
            for line in lines:
                terminalreporter.write_line(line)
