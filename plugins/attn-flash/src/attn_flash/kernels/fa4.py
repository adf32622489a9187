"""flash/fa4: FlashAttention-4, for Hopper and Blackwell, compiled from Python (CuTe DSL) when it is first used.

It says None where FlashAttention-2 says -1, and always returns two values. It has neither dropout nor ALiBi (its
`score_mod` could say the latter, as a function in another language). Its kernels for sm_8x and sm_12x are other ones,
young, and without pages, and are not declared.

Its checks let through pairs of head_dim and head_dim_v for which its kernels of sm_90 cannot be compiled: in the
forward where values are much longer than keys (64 with 224), in the backward some (128 with 160).
"""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import (
    Backward,
    Cached,
    Capabilities,
    Causal,
    Kernel,
    KeyPadding,
    Paged,
    Problem,
    Refusal,
    Segments,
    Unusable,
    Window,
)
from attn_core.bias import AttnBias

from .. import library
from . import masks, priors
from .fa2 import HALF

IN_BACKWARD: frozenset[type[AttnBias] | AttnBias] = frozenset({Causal("bottom-right"), Window, Segments})
BIASES: frozenset[type[AttnBias] | AttnBias] = frozenset({*IN_BACKWARD, KeyPadding, Cached, Paged})
#: Of Blackwell, which has the common sizes and two more.
BLACKWELL_DIMS = frozenset({*range(8, 129, 8), 192, 256})
#: Pages are loaded in columns of so many.
PAGED_DIMS = 16
#: A beta with what earlier ones assert against or cannot compile: the first that has it of betas 13, 24, 30, 34 and 36.
COMPLETED = "4.0.0b34"


def probe() -> Unusable | None:
    """Whether FlashAttention-4 is there, with what it is compiled by."""
    return library.FA4.unusable()


def refuse(problem: Problem) -> Iterator[Refusal]:
    """What the declarations cannot say."""
    yield from masks.refusals(problem)
    yield from masks.refusals_of_corners(problem)
    yield from masks.refusals_of_gaps(problem, in_forward=False)
    dim, dim_v = problem.head_dim, problem.head_dim_v
    if problem.in_pages and (dim % PAGED_DIMS or dim_v % PAGED_DIMS):
        text = f"takes pages with multiples of {PAGED_DIMS} for head_dim and head_dim_v"
        yield Refusal("bias", f"{text}, got {dim} with {dim_v}")
    if problem.compute_capability is not None and problem.compute_capability >= (10, 0):
        yield from _refusals_of_blackwell(problem)
    elif problem.needs_backward and dim != dim_v and problem.num_heads != problem.num_kv_heads:
        text = f"takes num_kv_heads equal to num_heads={problem.num_heads} in the backward where head_dim_v is another"
        yield Refusal("backward.gqa", f"{text} than head_dim, got {problem.num_kv_heads} with {dim} and {dim_v}")
    if library.FA4.is_older(COMPLETED):
        yield from _refusals_of_older_betas(problem)


def _refusals_of_older_betas(problem: Problem) -> Iterator[Refusal]:
    here = f"in flash-attn-4 {library.FA4.installed()}; {COMPLETED} does"
    is_blackwell = problem.compute_capability is not None and problem.compute_capability >= (10, 0)
    dim = problem.head_dim
    if is_blackwell and dim == 256 and masks.asked(problem.bias).is_window:
        yield Refusal("bias", f"takes no window with head_dim 256 {here}; got {problem.bias!r}")
    if is_blackwell and dim == 256 and problem.needs_backward and problem.deterministic:
        yield Refusal("backward.deterministic", f"has no deterministic backward with head_dim 256 {here}")
    if not is_blackwell and max(dim, problem.head_dim_v) > 192 and problem.needs_backward:
        text = f"takes no head_dim or head_dim_v above 192 in the backward of sm_90 {here}"
        yield Refusal("backward.head_dims", f"{text}; got {dim} with {problem.head_dim_v}")


def _refusals_of_blackwell(problem: Problem) -> Iterator[Refusal]:
    dim, dim_v = problem.head_dim, problem.head_dim_v
    if not (dim <= 128 and dim_v <= 128) and (dim, dim_v) not in ((192, 128), (256, 256)):
        text = "takes head_dim and head_dim_v up to 128, or 192 with 128, or 256 with 256"
        yield Refusal("head_dim_v", f"{text}, got {dim} with {dim_v}")
    if dim == 256 and problem.softcap is not None:
        yield Refusal("softcap", f"takes no softcap with head_dim 256, got {problem.softcap:g}")
    if dim == 256 and problem.bias is not None and problem.bias.has_padding:
        yield Refusal("bias", f"takes no cache, pages, padding or gaps with head_dim 256, got {problem.bias!r}")
    if dim == 256 and problem.needs_backward and masks.asked(problem.bias).is_window:
        yield Refusal("backward.biases", f"takes no window with head_dim 256 in the backward, got {problem.bias!r}")
    if dim == 256 and problem.needs_backward and problem.return_lse:
        yield Refusal("lse_grad", "does not differentiate through the LSE with head_dim 256, and a gradient is needed")


HOPPER = Capabilities(
    devices={"cuda"},
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    head_dims_v=range(8, 193, 8),
    biases=BIASES,
    backward=Backward(head_dims_v={64, 128, 192}, biases=IN_BACKWARD, lse_grad=True, deterministic=True),
    gqa=True,
    softcap=True,
    return_lse=True,
    deterministic=True,
    min_compute_capability=(9, 0),
    max_compute_capability=(9, 0),
)
BLACKWELL = Capabilities(
    devices={"cuda"},
    dtypes=HALF,
    head_dims=BLACKWELL_DIMS,
    head_dims_v=BLACKWELL_DIMS,
    biases=BIASES,
    backward=Backward(biases=IN_BACKWARD, lse_grad=True, deterministic=True),
    gqa=True,
    softcap=True,
    return_lse=True,
    deterministic=True,
    min_compute_capability=(10, 0),
    max_compute_capability=(11, 0),
)
KERNEL = Kernel(
    name="flash/fa4",
    run="attn_flash.kernels.run_fa4:run",
    capabilities=(HOPPER, BLACKWELL),
    refuse=refuse,
    probe=probe,
    costs={"cuda": priors.FA4},
    skips={Causal, Window, Segments, Cached, Paged},
)
