"""Is it right? Every result, forward and backward, beside the float64 reference, under the error budget."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..explain import explain
from ..functional import attention
from ..problem import Problem
from ..testing.budget import compare
from ..testing.differences import by_naive, by_reference, differences, results_of
from ..testing.naive import terms_of
from ..testing.problems import Inputs
from .cases import Case
from .checks import check, taken
from .results import CheckFailed
from .subject import SEED, Subject, deterministic

#: What one problem exercises, so that each of these fields is held against the reference where it is declared.
COMPARED = (
    *("devices", "numerics", "min_compute_capability", "max_compute_capability"),
    *("dtypes", "head_dims", "head_dims_v", "biases", "backward", "gqa", "softcap", "return_lse"),
    *("strided_head_dim", "empty_lengths", "bias_grad", "lse_grad"),
    *("backward.dtypes", "backward.head_dims", "backward.head_dims_v", "backward.biases", "backward.gqa"),
    *("backward.min_compute_capability",),
)
#: An approximate kernel (int8, fp8) is right where the error of each result, as a whole, stays below this part of it.
APPROXIMATE = 0.1


@check("numbers", taken, COMPARED)
def agrees(subject: Subject, case: Case) -> float:
    """Output, LSE and every gradient lie within the error budget of the float64 reference."""
    subject.must_take(case)
    inputs = case.inputs(SEED)
    if subject.declared.numerics == "approximate":
        return _roughly_agrees(subject, case.problem, inputs)
    with deterministic(False):
        (results,) = differences(case.problem, inputs, subject.call)
    wrong = [str(result) for result in results if not result]
    if wrong:
        raise CheckFailed("\n".join(wrong))
    return max((result.error / result.allowed for result in results if result.error and result.allowed), default=0.0)


def _roughly_agrees(subject: Subject, problem: Problem, inputs: Inputs) -> float:
    with deterministic(False):
        results = results_of(subject.call, problem, inputs)
    errors, sizes = {}, {}
    for name, want in results_of(by_reference, problem, inputs).items():
        if name not in results:
            raise CheckFailed(f"{name} is missing")
        there = torch.isfinite(want)  # the LSE of a row without keys is -inf
        got, want = (torch.where(there, tensor.detach().double(), 0.0) for tensor in (results[name], want))
        errors[name], sizes[name] = float((got - want).norm()), float(want.norm())
    # A gradient may be 0, as to the query of a single key: what is left of it is noise of the others' size.
    noise = 0.01 * max((size for name, size in sizes.items() if name not in ("out", "lse")), default=0.0)
    parts = {
        name: error / max(sizes[name], 1e-30 if name in ("out", "lse") else noise, 1e-30)
        for name, error in errors.items()
    }
    wrong = [
        f"{name}: error {part:.3g} of the result, more than {APPROXIMATE:g} for an approximate kernel"
        for name, part in parts.items()
        if not part <= APPROXIMATE
    ]
    if wrong:
        raise CheckFailed("\n".join(wrong))
    return max(parts.values()) / APPROXIMATE


def _with_dropout(subject: Subject) -> list[Case]:
    if not subject.declared.dropout:
        return []
    cases = [("no bias", subject.base)]
    cases += [(case.label, case.problem) for case in subject.taken if case.label.startswith("bias ")][:3]
    return [
        Case(label=f"{p:g}, {label}", proves="dropout", problem=replace(_forward(problem), dropout_p=p))
        for label, problem in cases
        for p in (0.1, 0.5)
    ]


def _forward(problem: Problem) -> Problem:
    return replace(problem, requires_grad=False, bias_requires_grad=False, return_lse=False)


@check("numbers", _with_dropout, ("dropout",))
def drops_weights(subject: Subject, case: Case) -> None:
    """A weight is dropped with the probability that was asked for, or kept and divided by what is left."""
    subject.must_take(case)
    inputs = case.inputs(SEED)
    with torch.no_grad():
        assert_dropout_is_honoured(subject.name, inputs)


def assert_dropout_is_honoured(kernel: str, inputs: Inputs) -> None:
    """Raises CheckFailed unless each weight is 0, or its own divided by 1 - p, in about the numbers expected.

    Which ones are dropped differs between kernels. Values are the rows of a unit matrix, so that the output is the
    weights themselves; a kernel that refuses so wide a head is not judged.
    """
    options = {**inputs.options, "return_lse": False}
    p = options.pop("dropout_p")
    if not inputs.query.numel() or not inputs.key.numel():
        return
    in_pages = inputs.bias is not None and inputs.bias.paged is not None
    rows = inputs.key.shape[:2] if in_pages else (1, inputs.key.shape[1])  # a row for every place in the pages
    columns = torch.eye(math.prod(rows), dtype=inputs.query.dtype, device=inputs.query.device)
    value = columns.reshape(*rows, 1, -1).expand(*inputs.key.shape[:3], -1)
    with torch.no_grad():
        if explain(inputs.query, inputs.key, value, inputs.bias, dropout_p=p, **options)[kernel].seconds is None:
            return
        got = attention(inputs.query, inputs.key, value, inputs.bias, dropout_p=p, kernel=kernel, **options)
        whole = replace(inputs, value=value, grad_out=torch.zeros_like(got), grad_lse=None)
        scaling = {option: options[option] for option in ("scale", "softcap") if option in options}
        terms = terms_of(whole.query, whole.key, value, whole.bias, whole.grad_out, None, **scaling)
        weights, naive = by_reference(whole)[0], by_naive(whole)[0].double()
    kept = (got != 0).double() / (1 - p)
    found = compare("weights", got, weights * kept, naive * kept, got.dtype, terms=terms.out / (1 - p))
    if not found:
        raise CheckFailed(f"{kernel}: {found}")
    weighty = weights > 1e-4  # one that underflows is 0 without being dropped
    number, dropped = int(weighty.sum()), int((weighty & (got == 0)).sum())
    if not abs(dropped - p * number) <= 5 * math.sqrt(p * (1 - p) * number) + 1:
        raise CheckFailed(f"{kernel}: dropped {dropped} of {number} weights, asked for {p:g} of them")
