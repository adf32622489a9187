"""Is it right on what real models ask? Problems of timm, transformers and diffusers, beside the reference."""

from __future__ import annotations

from dataclasses import replace

from ..problem import Problem
from ..testing.recorded import Recorded, evenly, recorded_problems
from .cases import Case
from .checks import check
from .numbers import agrees
from .subject import Subject

#: Rows of a kernel, and the logits of one: the reference holds each in float64, with all of its gradients.
ROWS, LOGITS = 30, 1 << 20


def _replayed(subject: Subject) -> list[Case]:
    """Those that the kernel takes and that are small enough, from each kind of bias in turn."""
    asked: dict[Problem, Recorded] = {}
    for recorded in recorded_problems():
        problem = _here(recorded.problem, subject)
        if problem is not None and _logits(problem) <= LOGITS:
            asked.setdefault(problem, replace(recorded, problem=problem))
    return [
        Case(label=f"{each.origin}, {each.kind}, {_shape(each.problem)}", problem=each.problem)
        for each in evenly(asked.values(), ROWS)
    ]


def _here(problem: Problem, subject: Subject) -> Problem | None:
    """The problem on the subject's device, without its dropout, and without its backward where that is refused."""
    there = replace(problem, device=subject.device, compute_capability=subject.base.compute_capability, dropout_p=0.0)
    return next((each for each in (there, _forward(there)) if subject.takes(each)), None)


def _forward(problem: Problem) -> Problem:
    bias = problem.bias
    if bias is not None and bias.requires_grad:
        bias = bias.with_held({name: tensor.detach() for name, tensor in bias.held().items()})
    return replace(problem, bias=bias, requires_grad=False, bias_requires_grad=False)


def _logits(problem: Problem) -> int:
    return problem.batch * problem.num_heads * problem.seqlen_q * problem.seqlen_kv


def _shape(problem: Problem) -> str:
    kv_heads = "" if problem.num_heads == problem.num_kv_heads else f":{problem.num_kv_heads}"
    lengths = f"{problem.seqlen_q}x{problem.seqlen_kv}"
    return f"{problem.batch}x{problem.num_heads}{kv_heads}x{lengths}x{problem.head_dim}"


@check("numbers", _replayed)
def agrees_on_recorded_problems(subject: Subject, case: Case) -> float:
    """Problems that models of timm, transformers and diffusers asked, as `agrees` compares them."""
    return agrees(subject, case)
