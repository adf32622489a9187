"""A kernel beside the reference on one problem: every result, forward and backward, under the error budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bias import TensorBias
from ..functional import attention
from ..problem import Problem
from ..reference import reference_attention
from .budget import Comparison, compare
from .naive import naive_attention, terms_of
from .problems import Inputs


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run gives: `out`, and what else was asked for."""

    out: Tensor
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None


Call = Callable[[Inputs], Any]


def results_of(call: Call, problem: Problem, inputs: Inputs) -> Results:
    """Runs `call(inputs)`, which returns out, or (out, lse), and its backward where the problem needs one."""
    result = call(inputs)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if not problem.return_lse:
        lse = None
    if not problem.needs_backward:
        return Results(out=out, lse=lse)
    wanted = {}
    if problem.requires_grad:
        wanted = {"dq": inputs.query, "dk": inputs.key, "dv": inputs.value}
    if problem.bias_requires_grad:
        assert isinstance(inputs.bias, TensorBias)
        wanted["dbias"] = inputs.bias.tensor
    outputs, fed = [out], [inputs.grad_out.to(out.dtype)]
    if lse is not None and lse.requires_grad:
        assert inputs.grad_lse is not None
        # An empty row's LSE is -inf whatever the operands: it has gradient 0.
        outputs, fed = [out, lse], [*fed, inputs.grad_lse.to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), fed, allow_unused=True)
    given = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), gradients)}
    return Results(out=out, lse=lse, **given)


def by_kernel(name: str) -> Call:
    """The call that insists on one kernel."""
    return lambda x: attention(x.query, x.key, x.value, x.bias, kernel=name, **x.options)


def by_reference(x: Inputs) -> Any:
    """The same call by the float64 reference; the dropout is left out."""
    options = {option: x.options[option] for option in ("scale", "softcap") if option in x.options}
    return reference_attention(x.query, x.key, x.value, x.bias, **options)


def by_naive(x: Inputs) -> Any:
    """The same call by a plain run in the operands' dtype."""
    return naive_attention(x.query, x.key, x.value, x.bias, scale=x.options["scale"], softcap=x.options.get("softcap"))


def differences(problem: Problem, inputs: Inputs, *calls: Call) -> list[list[Comparison]]:
    """Each call's results beside the reference: a list per call, with one comparison per result.

    The reference and the naive run are made once for all calls.
    """
    reference = results_of(by_reference, problem, _in_float64(inputs))
    naive = results_of(by_naive, problem, inputs)
    found = terms_of(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.bias,
        inputs.grad_out,
        inputs.grad_lse,
        scale=problem.scale,
        softcap=problem.softcap,
    )
    terms = {"out": found.out, "lse": found.lse, "dq": found.query, "dk": found.key, "dv": found.value}
    dtypes = dict.fromkeys(terms, problem.dtype)
    dtypes["lse"] = torch.float64 if problem.dtype is torch.float64 else torch.float32
    if isinstance(inputs.bias, TensorBias):
        terms["dbias"] = found.bias.sum_to_size(inputs.bias.tensor.shape)
        dtypes["dbias"] = inputs.bias.tensor.dtype
    comparisons = []
    for call in calls:
        got = results_of(call, problem, inputs)
        comparisons.append(
            [
                Comparison(name=name, passed=False, problem="is missing")
                if getattr(got, name) is None
                else compare(name, getattr(got, name), exact, getattr(naive, name), dtypes[name], terms=terms[name])
                for name, exact in vars(reference).items()
                if exact is not None
            ]
        )
    return comparisons


def _in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, so that the reference's gradients are not rounded to the operands' dtype."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    bias = inputs.bias
    if isinstance(bias, TensorBias) and bias.tensor.dtype is not torch.bool:
        bias = TensorBias(wide(bias.tensor), bias.lengths)
    return replace(inputs, query=wide(inputs.query), key=wide(inputs.key), value=wide(inputs.value), bias=bias)
