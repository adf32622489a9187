"""The error budget: how far a kernel's result may lie from the float64 reference.

    |result - reference|  <=  2 * (largest error of a naive run in the same dtype) + 4 ulp

The rule is that of FlashAttention's own tests. A fixed tolerance is either too loose for short rows or too tight for
long ones, and grows with every report of a flaky test; the naive run makes the error that the dtype itself costs on
these very numbers, so that a correct kernel stays within twice of it, whatever the sizes. It holds for out, LSE, dq,
dk, dv and d(bias) alike, and no kernel has a tolerance of its own.

An ulp is counted at the size of the terms that were added up, before they cancel. With a single key, for example, the
gradient to the query is exactly 0, since a softmax over one key is constant: what a kernel returns there is the
rounding of terms that cancel, and the naive run may by luck have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: How many times the naive run's error is allowed.
FACTOR = 2.0
#: And how many ulp on top of it.
ULPS = 4.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One result beside its reference.

    `worst` is the index where the error exceeds what is allowed by most (or comes nearest to it); the values and the
    errors are those at that index, but `naive_error`, which is the largest of the whole tensor. None of them is set
    for an empty tensor or a shape or dtype that differs; `problem` says so.
    """

    name: str
    passed: bool
    problem: str = ""  #: what is wrong; empty where it passed
    worst: tuple[int, ...] | None = None
    got: float | None = None
    reference: float | None = None
    error: float | None = None
    naive_error: float | None = None
    allowed: float | None = None
    failing: int = 0  #: elements beyond the budget
    elements: int = 0

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        if not self.passed and self.worst is None:
            return f"{self.name}: {self.problem}"
        if self.worst is None:
            return f"{self.name}: ok, no elements"
        place = f"[{', '.join(map(str, self.worst))}]"
        if self.passed:
            return f"{self.name}: ok, error {self.error:.3g} of {self.allowed:.3g} allowed at {place}"
        return (
            f"{self.name}: {self.problem}, {self.failing} of {self.elements} elements; worst at {place}:"
            f" got {self.got:.9g}, reference {self.reference:.9g}, error {self.error:.3g}, allowed {self.allowed:.3g}"
            f" ({FACTOR:g} x the naive run's {self.naive_error:.3g} + {ULPS:g} ulp)"
        )


def compare(
    name: str,
    got: Tensor,
    reference: Tensor,
    naive: Tensor,
    dtype: torch.dtype,
    *,
    terms: Tensor | None = None,
) -> Comparison:
    """Whether `got` lies within the budget.

    Args:
        name: of the result, for the report: "out", "lse", "dq", …
        got: what the kernel returned, in `dtype`.
        reference: the same in float64.
        naive: the same by a plain run in `dtype`.
        dtype: that the result must have, and whose ulp counts.
        terms: the size of the terms that each element sums up, broadcastable to it; None: the largest |reference|.

    NaN counts as an error where exactly one of got and reference is NaN. Where the reference is infinite (the LSE of a
    row without keys) `got` must be equal to it.
    """
    if got.shape != reference.shape:
        return Comparison(
            name=name, passed=False, problem=f"has shape {list(got.shape)}, must be {list(reference.shape)}"
        )
    if got.dtype != dtype:
        return Comparison(name=name, passed=False, problem=f"has dtype {got.dtype}, must be {dtype}")
    if got.numel() == 0:
        return Comparison(name=name, passed=True)
    got, reference, naive = (x.detach().double().cpu() for x in (got, reference, naive))
    exact = ~torch.isfinite(reference)  # nothing to be near to: must be the same
    same = (got == reference) | (got.isnan() & reference.isnan())

    naive_errors = (naive - reference).abs()
    counted = naive_errors[torch.isfinite(naive_errors)]  # where float16 overflows, the naive run says nothing
    naive_error = float(counted.max()) if counted.numel() else 0.0
    size = reference.abs().masked_fill(exact, 0.0).amax() if terms is None else terms.detach().double().cpu()
    info = torch.finfo(dtype)
    allowed = (FACTOR * naive_error + ULPS * (info.eps * size + info.smallest_normal * info.eps)).expand_as(reference)
    allowed = allowed.masked_fill(exact, 0.0)

    errors = (got - reference).abs()
    errors = errors.masked_fill(same, 0.0).masked_fill(errors.isnan() & ~same, float("inf"))
    failing = int((errors > allowed).sum())
    place = _worst(errors, allowed)
    one_is_nan = bool((got.isnan() != reference.isnan()).any())
    problem = "" if not failing else "is NaN where the reference is not" if one_is_nan else "is beyond the budget"
    if one_is_nan and not bool(got.isnan().any()):
        problem = "is a number where the reference is NaN"
    return Comparison(
        name=name,
        passed=failing == 0,
        problem=problem,
        worst=place,
        got=float(got[place]),
        reference=float(reference[place]),
        error=float(errors[place]),
        naive_error=naive_error,
        allowed=float(allowed[place]),
        failing=failing,
        elements=got.numel(),
    )


def _worst(errors: Tensor, allowed: Tensor) -> tuple[int, ...]:
    """Where the error is largest beside what is allowed."""
    ratio = errors / allowed.clamp_min(torch.finfo(torch.float64).tiny)
    flat = int(torch.where(errors == 0, 0.0, ratio).argmax())
    place = []
    for size in reversed(errors.shape):
        flat, index = divmod(flat, size)
        place.append(index)
    return tuple(reversed(place))
