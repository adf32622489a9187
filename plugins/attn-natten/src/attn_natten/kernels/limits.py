"""What some version of NATTEN would do otherwise than asked, without saying so, or cannot do at all."""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import Problem, Refusal

from .. import library


def refusals(problem: Problem, function: str) -> Iterator[Refusal]:
    """Of every kernel; `function` is the public one that runs it."""
    if problem.scale == 0:
        yield Refusal("scale", "takes a scale other than 0, which NATTEN takes for none given")
    if problem.return_lse and not library.NATTEN.takes(function, "return_lse"):
        yield Refusal("return_lse", f"natten {library.NATTEN.installed()} returns none from {function}")


def of_cuda(problem: Problem) -> Iterator[Refusal]:
    """Of the kernels that are written in CUDA."""
    if problem.scale < 0:  # they mask before they scale, so that -inf turns into +inf
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale}")
    if problem.compiling and not library.has_torch_ops():
        text = f"the kernels of natten {library.NATTEN.installed()} are no ops of torch here, which a graph could hold"
        yield Refusal("compiling", text)
    if problem.deterministic and problem.needs_backward and library.NATTEN.is_older("0.21.6"):
        text = f"before natten 0.21.6 its backward is not bit-equal, got natten {library.NATTEN.installed()}"
        yield Refusal("backward.deterministic", text)


def of_cutlass(problem: Problem) -> Iterator[Refusal]:
    """Of those for all GPUs: bfloat16 came with sm_80, and NATTEN says so only once it runs."""
    capability = problem.compute_capability
    if str(problem.dtype) == "torch.bfloat16" and capability is not None and capability < (8, 0):
        got = f"sm_{capability[0]}{capability[1]}"
        yield Refusal("dtype", f"takes float16, float32 before sm_80, got bfloat16 on {got}")
