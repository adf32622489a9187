"""NATTEN's neighborhood attention, declared: natten/cutlass-fna, hopper-fna, blackwell-fna and flex-fna.

A declaration is what NATTEN 0.21 can do at its best. `refuse` asks the installed one, by its predicates `can_run_*` and
its signatures, and that has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attn_core import Backward, Capabilities, Causal, Kernel, Neighborhood, Problem, Refusal, Unusable, Window
from attn_core.bias import AttnBias

from .. import library
from . import asked, limits, priors, windows
from .visited import work, work_of_flex

HALF = frozenset({torch.float16, torch.bfloat16})
WITH_FLOAT32 = HALF | {torch.float32}
#: A whole window on one axis is Causal or none at all, and a causal one a Window: biases come normalized.
BIASES: frozenset[type[AttnBias] | AttnBias] = frozenset({Neighborhood, Window, Causal("top-left")})
#: FlexAttention's sizes outside a graph.
FLEX_DIMS = frozenset({8, 16, 32, 64, 128, 256, 512})
#: The newest GPUs that a release of NATTEN 0.21 is built for.
NEWEST = (12, 1)


def _refusing(
    predicate: str, whole: str, *more: Callable[[Problem], Iterator[Refusal]]
) -> Callable[[Problem], Iterator[Refusal]]:
    """What a kernel refuses; `predicate` is NATTEN's own word, `whole` that of the dense kernel beside it, which NATTEN
    runs where the window is the whole sequence."""

    def refuse(problem: Problem) -> Iterator[Refusal]:
        rank = windows.rank_of(problem.bias)
        found = [*windows.refusals(problem), *limits.refusals(problem, f"na{rank}d")]
        for each in more:
            found += each(problem)
        if found:
            yield from found
        elif windows.is_whole(problem.bias):
            yield from asked.refusals(problem, whole, 1, causal=problem.bias is not None)
        else:
            yield from asked.refusals(problem, predicate, rank)

    return refuse


def probe_cuda() -> Unusable | None:
    """Whether NATTEN is there, with its kernels in CUDA."""
    return library.unusable(libnatten=True)


def probe_flex() -> Unusable | None:
    """Whether NATTEN is there."""
    return library.unusable(libnatten=False)


CUTLASS = Kernel(
    name="natten/cutlass-fna",
    run="attn_natten.kernels.run_fna:cutlass",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=WITH_FLOAT32,
        head_dims=range(8, 1 << 16, 8),
        head_dims_v=range(8, 1 << 16, 8),
        biases=BIASES,
        backward=Backward(deterministic=True),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(6, 0),
        max_compute_capability=NEWEST,
    ),
    refuse=_refusing("can_run_cutlass_fna", "can_run_cutlass_fmha", limits.of_cuda, limits.of_cutlass),
    probe=probe_cuda,
    costs={"cuda": priors.CUTLASS_FNA},
    work=work,
)
HOPPER = Kernel(
    name="natten/hopper-fna",
    run="attn_natten.kernels.run_fna:hopper",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=frozenset({32, 64, 128, 256}),
        biases=BIASES,
        backward=Backward(head_dims=frozenset({32, 64, 128})),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(9, 0),
        max_compute_capability=(9, 0),
    ),
    refuse=_refusing("can_run_cutlass_hopper_fna", "can_run_cutlass_hopper_fmha", limits.of_cuda),
    probe=probe_cuda,
    costs={"cuda": priors.HOPPER_FNA},
    work=work,
)
BLACKWELL = Kernel(
    name="natten/blackwell-fna",
    run="attn_natten.kernels.run_fna:blackwell",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(8, 129, 8),
        biases=BIASES,
        backward=Backward(),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(10, 0),
        max_compute_capability=(10, 3),
    ),
    refuse=_refusing("can_run_cutlass_blackwell_fna", "can_run_cutlass_blackwell_fmha", limits.of_cuda),
    probe=probe_cuda,
    costs={"cuda": priors.BLACKWELL_FNA},
    work=work,
)
FLEX = Kernel(
    name="natten/flex-fna",
    run="attn_natten.kernels.run_fna:flex",
    capabilities=(
        Capabilities(  # no backward: FlexAttention has none on the CPU
            devices={"cpu"},
            dtypes=WITH_FLOAT32,
            head_dims=FLEX_DIMS,
            biases=BIASES - {Causal("top-left")},
            gqa=True,
            return_lse=True,
            deterministic=True,
            strided_head_dim=True,
        ),
        Capabilities(
            devices={"cuda"},
            dtypes=WITH_FLOAT32,
            head_dims=FLEX_DIMS,
            biases=BIASES - {Causal("top-left")},
            backward=Backward(),
            gqa=True,
            return_lse=True,
            strided_head_dim=True,
            min_compute_capability=(7, 0),
        ),
    ),
    refuse=_refusing("can_run_flex_attention", "can_run_flex_attention"),
    probe=probe_flex,
    costs={"cpu": priors.FLEX_FNA_ON_CPU, "cuda": priors.FLEX},
    work=work_of_flex,
)

KERNELS = (CUTLASS, HOPPER, BLACKWELL, FLEX)
