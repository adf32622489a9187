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
        if device == "cuda" and not result:
            torch.cuda.synchronize()  # raises after a fault, which stays with the process: another goes on
    tell(end=True)


main(*sys.argv[1:])
