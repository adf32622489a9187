"""NATTEN's dense attention, declared: natten/cutlass-fmha, hopper-fmha, blackwell-fmha and flex-fmha.

Its causal mask starts at the top left, and documents are packed into one batch entry (varlen). As in `fna`, a
declaration is what NATTEN 0.21 can do at its best, and the installed one has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attn_core import Backward, Capabilities, Causal, Kernel, Problem, Refusal, Segments
from attn_core.bias import AttnBias

from . import asked, documents, limits, priors
from .fna import FLEX_DIMS, HALF, NEWEST, WITH_FLOAT32, probe_cuda, probe_flex

BIASES: frozenset[type[AttnBias] | AttnBias] = frozenset({Causal("top-left"), Segments})


def _refusing(predicate: str, *more: Callable[[Problem], Iterator[Refusal]]) -> Callable[[Problem], Iterator[Refusal]]:
    def refuse(problem: Problem) -> Iterator[Refusal]:
        found = [*documents.refusals(problem), *limits.refusals(problem, "attention")]
        for each in more:
            found += each(problem)
        varlen = isinstance(problem.bias, Segments)
        causal = isinstance(problem.bias, Causal) or (isinstance(problem.bias, Segments) and bool(problem.bias.within))
        yield from found or asked.refusals(problem, predicate, 1, causal, varlen)

    return refuse


CUTLASS = Kernel(
    name="natten/cutlass-fmha",
    run="attn_natten.kernels.run_fmha:cutlass",
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
    refuse=_refusing("can_run_cutlass_fmha", limits.of_cuda, limits.of_cutlass),
    probe=probe_cuda,
    costs={"cuda": priors.CUTLASS_FMHA},
    skips={Causal, Segments},
)
HOPPER = Kernel(
    name="natten/hopper-fmha",
    run="attn_natten.kernels.run_fmha:hopper",
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
    refuse=_refusing("can_run_cutlass_hopper_fmha", limits.of_cuda),
    probe=probe_cuda,
    costs={"cuda": priors.HOPPER_FMHA},
    skips={Causal, Segments},
)
BLACKWELL = Kernel(
    name="natten/blackwell-fmha",
    run="attn_natten.kernels.run_fmha:blackwell",
    capabilities=Capabilities(
        devices={"cuda"},
        dtypes=HALF,
        head_dims=range(8, 129, 8),
        biases=BIASES,
        backward=Backward(deterministic=True),
        gqa=True,
        return_lse=True,
        deterministic=True,
        compile=True,
        min_compute_capability=(10, 0),
        max_compute_capability=(10, 3),
    ),
    refuse=_refusing("can_run_cutlass_blackwell_fmha", limits.of_cuda),
    probe=probe_cuda,
    costs={"cuda": priors.BLACKWELL_FMHA},
    skips={Causal, Segments},
)
FLEX = Kernel(
    name="natten/flex-fmha",
    run="attn_natten.kernels.run_fmha:flex",
    capabilities=(
        Capabilities(  # no backward: FlexAttention has none on the CPU
            devices={"cpu"},
            dtypes=WITH_FLOAT32,
            head_dims=FLEX_DIMS,
            gqa=True,
            return_lse=True,
            deterministic=True,
            strided_head_dim=True,
        ),
        Capabilities(
            devices={"cuda"},
            dtypes=WITH_FLOAT32,
            head_dims=FLEX_DIMS,
            backward=Backward(),
            gqa=True,
            return_lse=True,
            strided_head_dim=True,
            min_compute_capability=(7, 0),
        ),
    ),
    refuse=_refusing("can_run_flex_attention"),
    probe=probe_flex,
    costs={"cpu": priors.FLEX_FMHA_ON_CPU, "cuda": priors.FLEX},
)

KERNELS = (CUTLASS, HOPPER, BLACKWELL, FLEX)
