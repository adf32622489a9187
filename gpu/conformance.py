"""Holds every ready kernel that declares CUDA to what it declares, each in a process of its own."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from attn_core import Kernel
from attn_core.registry import registry

DEVICE = "cuda"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Checks each kernel, writes its certificate, and tells how many checks passed, failed and were skipped."""
    from attn_core.conformance.certificate import certificate, write
    from attn_core.conformance.isolated import check_isolated

    rows = []
    for kernel, reason in candidates(options.kernels):
        if reason:
            rows.append({"kernel": kernel.name, "outcome": "not run", "reason": reason})
            continue
        started, results = time.perf_counter(), []
        for result in check_isolated(kernel.name, device=DEVICE, limit=options.limit):
            results.append(result)
            if not result:
                print(f"failed: {result.kernel} {result.name}: {result.reason}", flush=True)
        made = certificate(kernel, DEVICE, results)
        write(made, options.out / "certificates")
        count = Counter(result.status for result in results)
        rows.append(
            {
                "kernel": kernel.name,
                "outcome": "passed" if made.granted else "failed",
                **{status: count[status] for status in ("passed", "failed", "skipped")},
                "largest error, of the budget": made.error,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    return outcome(rows) | {"kernels": rows}


def candidates(pattern: str) -> list[tuple[Kernel, str]]:
    """Each kernel whose name fits, with the reason why it cannot run on CUDA here; empty where it can."""
    found = []
    for kernel in registry.kernels(pattern):
        condition = registry.condition(kernel)
        declared = any(DEVICE in each.devices or "*" in each.devices for each in kernel.declarations)
        reason = f"{condition.state}: {condition.reason}" if condition.state != "ready" else ""
        found.append((kernel, reason if declared else f"declares nothing for {DEVICE}"))
    return found


def outcome(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Failed where a row failed, or where none ran."""
    failed = [row["kernel"] for row in rows if row["outcome"] == "failed"]
    if failed:
        return {"outcome": "failed", "reason": f"{', '.join(dict.fromkeys(failed))} failed"}
    ran = {row["kernel"] for row in rows if row["outcome"] == "passed"}
    if not ran:
        return {"outcome": "failed", "reason": "no kernel could run"}
    return {"outcome": "passed", "reason": f"{len(ran)} kernels"}
