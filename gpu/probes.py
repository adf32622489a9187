"""The probes of attn-cuda-ref on the device: each primitive of its texts, such as a shuffle, against its definition.

They come first, since what the texts believe of an instruction, and their emulator with them, only a GPU can refute.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree
from importlib.util import find_spec
from typing import Any

from sources import ROOT

#: Tests that run on an emulator too; those of the device have this word in their names.
TESTS = ROOT / "plugins/attn-cuda-ref/tests/test_primitives.py"
OF_DEVICE = "gpu"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """How the probes ended; not run where no kernel of cuda-ref is asked for, or there is no pytest."""
    from attn_core.registry import registry
    from sanitizer import watched

    if not any(kernel.name.startswith("cuda-ref/") for kernel in registry.kernels(options.kernels)):
        return {"outcome": "not run", "reason": f"no kernel of cuda-ref is among {options.kernels}"}
    if find_spec("pytest") is None:
        return {"outcome": "not run", "reason": "pytest cannot be imported; --help says how to carry wheels"}
    report = options.out / "probes.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", OF_DEVICE]
    ended = watched([*command, f"--junitxml={report}", str(TESTS)], limit=10 * options.limit)
    if not report.is_file():
        return ended
    rows = [row(case) for case in xml.etree.ElementTree.parse(report).iter("testcase")]
    report.unlink()
    count = {status: sum(row["outcome"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    if ended["outcome"] == "passed" and not count["passed"]:
        ended = {"outcome": "failed", "reason": "no probe could run"}
    return {"reason": f"{count['passed']} probes", **ended, **count, "rows": rows}


def row(case: xml.etree.ElementTree.Element) -> dict[str, str]:
    """A test of the report: its name, how it ended, and why."""
    for tag, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return {"probe": case.get("name", ""), "outcome": status, "reason": found.get("message", "")}
    return {"probe": case.get("name", ""), "outcome": "passed"}
