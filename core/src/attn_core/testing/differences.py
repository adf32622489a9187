"""A kernel beside the reference on one problem: every result, forward and backward, under the error budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..bias import AttnBias
from ..functional import attention
from ..problem import Problem
from ..reference import reference_attention
from .budget import Comparison, compare
from .naive import naive_attention, terms_of
from .problems import Inputs

#: What a run gives, by name: "out", and "lse", "dq", "dk", "dv" and "dbias" where they were asked for; the gradient of
#: a bias that holds more than one tensor is named by the tensor, "dbias.slopes".
Results = dict[str, Tensor]
Call = Callable[[Inputs], Any]


def results_of(call: Call, problem: Problem, inputs: Inputs) -> Results:
    """Runs `call(inputs)`, which returns out, or (out, lse), and its backward where the problem needs one."""
    result = call(inputs)
    out, lse = result if isinstance(result, tuple) else (result, None)
    results = {"out": out}
    if problem.return_lse and lse is not None:
        results["lse"] = lse
    if not problem.needs_backward:
        return results
    wanted = {}
    if problem.requires_grad:
        wanted = {"dq": inputs.query, "dk": inputs.key, "dv": inputs.value}
    if problem.bias_requires_grad:
        wanted |= trained(inputs.bias)
    outputs, fed = [out], [inputs.grad_out.to(out.dtype)]
    if "lse" in results and results["lse"].requires_grad:
        assert inputs.grad_lse is not None
        # An empty row's LSE is -inf whatever the operands: it has gradient 0.
        outputs, fed = [out, results["lse"]], [*fed, inputs.grad_lse.to(results["lse"].dtype)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), fed, allow_unused=True)
    return results | {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), gradients)}


def trained(bias: AttnBias | None) -> dict[str, Tensor]:
    """The tensors of a bias that require a gradient, by the name of that gradient."""
    held = {} if bias is None else bias.held()
    named = {"dbias" if len(held) == 1 else f"dbias.{name}": tensor for name, tensor in held.items()}
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


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
    for name, tensor in trained(inputs.bias).items():
        terms[name] = _terms_of_gradient(inputs.bias, tensor, found.bias)
        dtypes[name] = tensor.dtype
    comparisons = []
    for call in calls:
        got = results_of(call, problem, inputs)
        comparisons.append(
            [
                compare(name, got[name], exact, naive[name], dtypes[name], terms=terms[name])
                if name in got
                else Comparison(name=name, passed=False, problem="is missing")
                for name, exact in reference.items()
            ]
        )
    return comparisons


def _terms_of_gradient(bias: AttnBias | None, tensor: Tensor, to_logits: Tensor) -> Tensor:
    """How large the terms are that the gradient of a held tensor sums up; `to_logits` those of the logits' gradient."""
    assert bias is not None
    with torch.enable_grad():
        dense = bias.bind(*to_logits.shape[2:]).dense(tensor.device, torch.float64)
        (terms,) = torch.autograd.grad(
            dense, tensor, to_logits.sum_to_size(_rank_four(dense)).reshape(dense.shape).to(dense.dtype)
        )
    return terms.abs()


def _rank_four(tensor: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - tensor.ndim) + tuple(tensor.shape)


def _in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, so that the reference's gradients are not rounded to the operands' dtype."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    bias = inputs.bias
    if bias is not None:
        held = {name: wide(tensor) for name, tensor in bias.held().items() if tensor.is_floating_point()}
        bias = bias.with_held(held)
    return replace(inputs, query=wide(inputs.query), key=wide(inputs.key), value=wide(inputs.value), bias=bias)
