"""A few small problems of each kernel under compute-sanitizer, which finds what lies outside of what is compared.

Under it everything takes many times as long, so it gets one problem per dtype, and whatever else is short. Run as a
script with the name of a kernel, this file is what is watched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
#: Each tensor in memory of its own: within the large pieces that torch else cuts up, no access is out of bounds.
WITHOUT_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
#: Exit code by which it says that it found something.
FOUND = 86
#: Labels of the problems begin so: a dtype each, one token, lengths with a tail, causal.
SMOKE = ("dtype ", "lengths 1 x", "bias Causal", "layout sliced")
SEED = 20261121


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Each kernel under each tool; without compute-sanitizer, that it was not run."""
    from conformance import candidates, outcome

    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if program is None:
        return {"outcome": "not run", "reason": "there is no compute-sanitizer on this machine", "rows": []}
    rows = []
    for kernel, reason in candidates(options.kernels):
        for tool in TOOLS:
            row = {"kernel": kernel.name, "tool": tool}
            if reason:
                rows.append(row | {"outcome": "not run", "reason": reason})
                continue
            command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__, kernel.name]
            rows.append(row | watched(command, limit=10 * options.limit, **WITHOUT_POOL))
    return outcome(rows) | {"program": program, "rows": rows}


def watched(command: list[str], *, limit: float, **variables: str) -> dict[str, str]:
    """How a command ended, run with these variables: passed, or failed with the last lines that it said."""
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "reason": f"did not end within {limit:g} s"}
    if done.returncode == 0:
        return {"outcome": "passed"}
    said = "\n".join(done.stdout.strip().splitlines()[-12:])
    how = "found something" if done.returncode == FOUND else f"ended with {done.returncode}"
    return {"outcome": "failed", "reason": f"{how}: {said}"}


def smoke_cases(name: str, device: str) -> Iterator[Any]:
    """The short cases of a kernel's own declaration."""
    from attn_core.conformance.subject import Subject
    from attn_core.registry import registry

    for case in Subject(registry.kernel(name), device).taken:
        if case.label.startswith(SMOKE):
            yield case


def smoke(name: str, device: str = "cuda") -> int:
    """Runs them, backward too where it is declared; returns how many there were."""
    import torch
    from attn_core import attention

    count = 0
    for count, case in enumerate(smoke_cases(name, device), 1):  # noqa: B007
        inputs = case.inputs(SEED)
        result = attention(inputs.query, inputs.key, inputs.value, inputs.bias, kernel=name, **inputs.options)
        for tensor in result if isinstance(result, tuple) else (result,):
            if tensor.requires_grad:
                tensor.sum().backward(retain_graph=True)
        if device == "cuda":
            torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if not smoke(sys.argv[1]):
        sys.exit(f"{sys.argv[1]} takes none of the small problems")
