"""Binding: makes the function that runs one choice, so that a cached call does nothing but run it.

The function takes `(query, key, value, bias)` in the caller's layout. What can be settled beforehand (keywords, a bias
without data, the layout, the adaptations) is settled here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .adapt import Adaptation, Operands
from .bias import AttnBias, TensorBias
from .door import HEADS_FIRST, HEADS_LAST
from .kernel import Bound, Kernel, Run
from .problem import Problem

Steps = tuple[tuple[Adaptation, Problem], ...]


def bind(
    run: Run,
    kernel_heads: int,
    steps: Steps,
    problem: Problem,
    bias: AttnBias | None,
    heads: int,
    prepare: Callable[[Problem], Bound | None] | None = None,
) -> Bound:
    """The function that runs `problem` by `run`, a kernel's function, after `steps`.

    `heads` and `kernel_heads` are the dimension of the heads for the caller and for the kernel. `bias` is the call's,
    bound and normalized; one that holds data is taken anew at every call, with the same key. `prepare` is the
    kernel's.
    """
    bound = None
    if steps:
        bound = _adapted(run, kernel_heads, steps, problem, bias)
    elif prepare is not None:
        bound = prepare(problem)
        if bound is not None and bias is not None and bias.holds_data and not isinstance(bias, TensorBias):
            bound = simplified(bound, bias.bound_lengths())
    if bound is None:
        bound = _direct(run, problem, bias)
    if kernel_heads == heads:
        return bound
    return _swapped_pair(bound) if problem.return_lse else _swapped(bound)


def simplified(call: Bound, lengths: tuple[int, int]) -> Bound:
    """`call`, given what each call's own bias is at these lengths: bound, in the simplest form that means the same."""

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return call(query, key, value, _anew(bias, lengths, key))

    return run


def heads_of(kernel: Kernel) -> int:
    """The dimension of the heads in the kernel's layout."""
    return HEADS_FIRST if kernel.layout == "heads-first" else HEADS_LAST


def _options(problem: Problem) -> dict[str, Any]:
    """The keywords beside `scale` and `bias` that the problem uses."""
    options: dict[str, Any] = {}
    if problem.softcap is not None:
        options["softcap"] = problem.softcap
    if problem.dropout_p:
        options["dropout_p"] = problem.dropout_p
    if problem.return_lse:
        options["return_lse"] = True
    return options


def _direct(run: Run, problem: Problem, bias: AttnBias | None) -> Bound:
    scale, options = problem.scale, _options(problem)
    if bias is None:
        if not options:
            return lambda query, key, value, _: run(query, key, value, scale=scale)
        return lambda query, key, value, _: run(query, key, value, scale=scale, **options)
    if not bias.holds_data:
        return lambda query, key, value, _: run(query, key, value, bias=bias, scale=scale, **options)
    lengths = bias.bound_lengths()
    if isinstance(bias, TensorBias):  # its key has said all that bind would check; the caller has one, too
        return lambda query, key, value, b: run(query, key, value, bias=b.at(lengths), scale=scale, **options)

    def run_with(query: Tensor, key: Tensor, value: Tensor, b: AttnBias) -> Any:
        return run(query, key, value, bias=_anew(b, lengths, key), scale=scale, **options)

    return run_with


def _anew(bias: AttnBias, lengths: tuple[int, int], key: Tensor) -> AttnBias | None:
    """A call's own bias, with what it holds checked as that of the first call was."""
    bound = bias.bind(*lengths).normalize()
    pages = None if bound is None else bound.paged
    if pages is not None:
        pages.check_pages(key.shape[0])
    return bound


def _adapted(run: Run, heads: int, steps: Steps, problem: Problem, bias: AttnBias | None) -> Bound:
    scale, options = problem.scale, _options(problem)
    befores = (problem, *(after for _, after in steps))
    head_dim_v, padded = problem.head_dim_v, befores[-1].head_dim_v != problem.head_dim_v
    lengths = None if bias is None else bias.bound_lengths()
    constant = bias if bias is None or not bias.holds_data else None

    def call(query: Tensor, key: Tensor, value: Tensor, b: AttnBias | None) -> Any:
        given = constant if b is None or constant is not None or lengths is None else _anew(b, lengths, key)
        x = Operands(query, key, value, given)
        for i, (adaptation, after) in enumerate(steps):
            x = adaptation.apply(x, befores[i], after, heads)
        if x.bias is None:
            result = run(x.query, x.key, x.value, scale=scale, **options)
        else:
            result = run(x.query, x.key, x.value, bias=x.bias, scale=scale, **options)
        if not padded:
            return result
        if problem.return_lse:
            return result[0][..., :head_dim_v], result[1]
        return result[..., :head_dim_v]

    return call


def _swapped(call: Bound) -> Bound:
    def swapped(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias).transpose(1, 2)

    return swapped


def _swapped_pair(call: Bound) -> Bound:
    def swapped(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        out, lse = call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias)
        return out.transpose(1, 2), lse

    return swapped


def under_autocast(call: Bound, device: str, dtype: torch.dtype) -> Bound:
    """Casts the operands once, as SDPA does under autocast, and keeps the kernel's inside out of it."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return call(cast(query), cast(key), cast(value), bias)

    return run
