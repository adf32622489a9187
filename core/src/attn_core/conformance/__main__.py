"""The child of `isolated`: runs rows from one on, and writes what it does into a pipe, a line of JSON each."""

from __future__ import annotations

import json
import os
import sys
import warnings

import torch

from ..registry import registry
from .results import CheckResult
from .run import every_case, result_of
from .subject import Subject


def has_faulted(device: str) -> bool:
    """Whether the device answers this process no more: a fault of a GPU stays with it, so another has to go on."""
    try:
        torch.get_device_module(device).synchronize()
    except Exception:  # each backend raises what it likes
        return True
    return False


def main(kernel: str, device: str, only: str, first: str, pipe: str) -> None:
    def tell(**told: object) -> None:
        os.write(int(pipe), json.dumps(told).encode() + b"\n")

    warnings.simplefilter("ignore")
    subject = Subject(registry.kernel(kernel), device)
    for row, (check, case) in enumerate(every_case(subject, only or None)):
        if row < int(first):
            continue
        label = "" if isinstance(case, CheckResult) else case.label
        problem = "" if isinstance(case, CheckResult) else str(case.problem)
        tell(row=row, check=check.name, case=label, problem=problem)
        result = result_of(subject, check, case)
        tell(row=row, result=result.as_data())
        if not result and has_faulted(device):
            tell(fault=True)
            return
    tell(end=True)


main(*sys.argv[1:])
