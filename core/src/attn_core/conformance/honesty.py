"""Does it say what it can do? It must take all that it declares, refuse the rest, and name the right field."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..bias import AttnBias, Causal, KeyPadding, Paged, PrefixLM, TensorBias, Window
from ..capabilities import ANY_DIM, Backward, Capabilities, Refusal, covers
from ..errors import KernelRefusedError
from ..problem import Problem
from .cases import Case, changed, sizes_of
from .checks import a_few, check, once
from .results import CheckFailed, NotTestable
from .subject import SEED, Subject, deterministic

EVERYTHING = tuple(field.name for field in fields(Capabilities))
EVERYTHING_BACKWARD = tuple(f"backward.{field.name}" for field in fields(Backward))


@check("honesty", once, EVERYTHING)
def takes_what_it_claims(subject: Subject, case: Case) -> None:
    """Nothing that is declared is refused in every form by the kernel's own limits."""
    claims: dict[str, list[list[Refusal]]] = {}
    for claimed in subject.claimed:
        if claimed.proves:
            claims.setdefault(claimed.proves, []).append(subject.kernel.refusals(claimed.problem))
    empty = [
        f"{claim} is declared, and refused in every form: {refusals[0][0]}"
        for claim, refusals in claims.items()
        if all(refusals)
    ]
    if empty:
        raise CheckFailed("\n".join(empty))


def undeclared(subject: Subject) -> Iterator[tuple[str, Problem]]:
    """(field that must be named, problem) for whatever the declaration leaves out; each changes one thing."""
    declared, base = subject.declared, subject.base
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        if dtype not in declared.dtypes:
            yield "dtype", replace(base, dtype=dtype)
    beyond = [dim for dim in (*_neighbours(declared.head_dims), 1, 7, 8, 20, 264, 4096) if dim > 0]
    for dim in sorted({dim for dim in beyond if dim not in declared.head_dims and dim not in ANY_DIM[-1:]}):
        yield "head_dim", replace(base, head_dim=dim, head_dim_v=dim)
    if declared.head_dims_v is None:
        yield "head_dim_v", replace(base, head_dim_v=base.head_dim + 8)
    for bias in _biases(base):
        bound = bias.bind(base.seqlen_q, base.seqlen_kv).normalize()
        if bound is not None and not covers(declared.biases, bound):
            yield "bias", replace(base, bias=bound.without_data())
    if not declared.gqa:
        yield "num_kv_heads", replace(base, num_kv_heads=1)
    if not declared.softcap:
        yield "softcap", replace(base, softcap=2.0)
    if not declared.dropout:
        yield "dropout_p", replace(base, dropout_p=0.5)
    for name in ("return_lse", "deterministic", "forward_ad", "strided_head_dim"):
        if not getattr(declared, name):
            yield name, changed(base, name, True)
    if not declared.compile:
        yield "compiling", replace(base, compiling=True)
    if not declared.empty_lengths:
        for name in ("batch", "seqlen_q", "seqlen_kv"):
            yield "empty_lengths", changed(base, name, 0)
    yield from _undeclared_backward(subject)
    yield from _other_devices(subject)


def _undeclared_backward(subject: Subject) -> Iterator[tuple[str, Problem]]:
    backward, trained = subject.backward, replace(subject.base, requires_grad=True)
    if backward is None:
        yield "backward", trained
        return
    for dtype in set(subject.declared.dtypes) - set(backward.dtypes or subject.declared.dtypes):
        yield "backward.dtypes", replace(trained, dtype=dtype)
    if backward.head_dims is not None:
        for dim in sizes_of(subject.declared.head_dims):
            if dim not in backward.head_dims:
                yield "backward.head_dims", replace(trained, head_dim=dim, head_dim_v=dim)
    if backward.head_dims_v is not None and subject.declared.head_dims_v is not None:
        for dim in sizes_of(subject.declared.head_dims_v):
            if dim != trained.head_dim and dim not in backward.head_dims_v:
                yield "backward.head_dims_v", replace(trained, head_dim_v=dim)
    if subject.declared.gqa and backward.gqa is False:
        yield "backward.gqa", replace(trained, num_kv_heads=1)
    if backward.biases is not None:
        for case in subject.taken:
            bias = case.problem.bias
            if bias is not None and not covers(backward.biases, bias):
                yield "backward.biases", replace(case.problem, requires_grad=True)
    if not backward.bias_grad and TensorBias in subject.declared.biases:
        tensor = torch.empty(trained.seqlen_q, trained.seqlen_kv, dtype=trained.dtype, device="meta")
        bias = TensorBias(tensor.requires_grad_()).bind(trained.seqlen_q, trained.seqlen_kv)
        yield "bias_grad", replace(trained, bias=bias, bias_requires_grad=True)
    if subject.declared.return_lse and not backward.lse_grad:
        yield "lse_grad", replace(trained, return_lse=True)
    if subject.declared.deterministic and not backward.deterministic:
        yield "backward.deterministic", replace(trained, deterministic=True)


def _other_devices(subject: Subject) -> Iterator[tuple[str, Problem]]:
    declared, base = subject.declared, subject.base
    anywhere = {device for capabilities in subject.kernel.declarations for device in capabilities.devices}
    for device in ("cpu", "cuda", "mps", "a_device_of_tomorrow"):
        if device not in anywhere and "*" not in anywhere:
            yield "device", replace(base, device=device, compute_capability=None)
    low, high = declared.min_compute_capability, declared.max_compute_capability
    if base.is_cuda and low is not None:
        yield "compute_capability", replace(base, compute_capability=(low[0] - 1, 0))
        yield "compute_capability", replace(base, compute_capability=None)
    if base.is_cuda and high is not None:
        yield "compute_capability", replace(base, compute_capability=(high[0] + 1, 0))


def _neighbours(sizes: Any) -> list[int]:
    found = sizes_of(sizes)
    return [size + step for size in found for step in (-1, 1)]


def _biases(base: Problem) -> Iterator[AttnBias]:
    yield from (Causal("top-left"), Window(3, 2), Window(None, 4), PrefixLM(3, "top-left"))
    yield KeyPadding(torch.empty(base.batch, dtype=torch.int64, device="meta"))
    table = torch.empty(base.batch, 3, dtype=torch.int32, device="meta")
    yield Paged(table, torch.empty(base.batch, dtype=torch.int32, device="meta"), base.seqlen_kv // 3)
    for dtype in (torch.bool, base.dtype):
        yield TensorBias(torch.empty(base.seqlen_q, base.seqlen_kv, dtype=dtype, device="meta"))


@check("honesty", once, EVERYTHING + EVERYTHING_BACKWARD)
def refuses_what_it_does_not_claim(subject: Subject, case: Case) -> None:
    """Whatever is not declared is refused, and the field is named."""
    wrong = []
    for field, problem in undeclared(subject):
        named = [refusal.field for refusal in subject.kernel.refusals(problem)]
        if field not in named:
            wrong.append(f"{field} is not declared, but named are {named or 'none'} for: {problem}")
    if wrong:
        raise CheckFailed("\n".join(wrong))


@check("honesty", once)
def a_call_that_it_refuses_raises(subject: Subject, case: Case) -> None:
    """A caller who insists on the kernel for what it refuses gets an error with its name and reasons."""
    for _, problem in undeclared(subject):
        on_this_device = (
            problem.device == subject.device and problem.compute_capability == subject.base.compute_capability
        )
        drawable = on_this_device and not problem.compiling and not problem.forward_ad
        if not drawable or _adaptable(subject, problem):
            continue
        inputs = Case(label="", problem=problem).inputs(SEED)
        with deterministic(problem.deterministic):
            try:
                subject.run(inputs)
            except KernelRefusedError as error:
                if subject.name in str(error):
                    continue
                raise CheckFailed(f"the error does not name {subject.name}: {error}") from error
        raise CheckFailed(f"it ran what it refuses: {problem}")


def _adaptable(subject: Subject, problem: Problem) -> bool:
    from ..registry import registry
    from ..scope import current
    from ..select import consider

    return consider(registry, subject.kernel, problem, current.get().settings).takes


@check("honesty", a_few)
def never_calls_sdpa_where_it_says_so(subject: Subject, case: Case) -> None:
    """Declared with `calls_sdpa=False`, its forward does not reach F.scaled_dot_product_attention."""
    if subject.kernel.calls_sdpa:
        raise NotTestable("it does not declare calls_sdpa=False")
    subject.must_take(case)
    inputs = case.inputs(SEED)
    stock, calls = F.scaled_dot_product_attention, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return stock(*args, **kwargs)

    F.scaled_dot_product_attention = counting
    try:
        subject.run(inputs)
    finally:
        F.scaled_dot_product_attention = stock
    if calls:
        raise CheckFailed(
            "it declares calls_sdpa=False, and calls F.scaled_dot_product_attention: where that is redirected, it would"
            " be called by itself without end"
        )


@check("honesty", once)
def its_reasons_can_be_read(subject: Subject, case: Case) -> None:
    """Refusals name a field and say something, can be kept in a set, and be sent to another process."""
    problems = [problem for _, problem in undeclared(subject)] + [claimed.problem for claimed in subject.claimed]
    refusals = [refusal for problem in problems for refusal in subject.kernel.refusals(problem)]
    if not refusals:
        raise NotTestable("it refuses nothing")
    for refusal in refusals:
        if not (isinstance(refusal, Refusal) and refusal.field.strip() and refusal.message.strip()):
            raise CheckFailed(f"a refusal must have a field and a message, got {refusal!r}")
        if refusal.field == "refuse":
            raise CheckFailed(refusal.message)
        if len({refusal, pickle.loads(pickle.dumps(refusal))}) != 1:
            raise CheckFailed(f"a refusal must survive pickling, got {refusal!r}")
