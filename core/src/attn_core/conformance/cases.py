"""Problems derived from what a kernel declares: for each thing that it claims, the ends and the odd ones between.

A claim makes the problems by which it is judged, so whoever declares more is tested on more, and nothing has to be
listed by the kernel's author.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..bias import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    Intersection,
    KeyPadding,
    Mask,
    Neighborhood,
    Paged,
    PrefixLM,
    RelPosTable,
    Score,
    Segments,
    Sum,
    TensorBias,
    Window,
)
from ..capabilities import Backward, BiasKind, Capabilities
from ..door import compute_capability
from ..kernel import Kernel
from ..problem import Problem
from ..testing.problems import LAYOUTS, Inputs, Layout, build

#: Sizes of the last dimension that kernels distinguish; larger ones take long and find nothing new.
DIMS = (1, 2, 3, 8, 15, 16, 24, 32, 40, 48, 64, 65, 72, 80, 96, 112, 128, 130, 160, 192, 200, 224, 256, 257, 512)
LARGEST_DIM = 512
#: In this order the dtype and size of problems that are about something else are picked.
FIRST_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FIRST_DIMS = (32, 64, 16, 128, 8)
BATCH, HEADS, SEQLEN, SEQLEN_KV = 2, 6, 33, 47
#: Several tiles of any kernel, and no multiple of one.
SEQLEN_LONG = 165
#: (seqlen_q, seqlen_kv) on which each bias is tried.
LENGTHS = ((SEQLEN, SEQLEN), (SEQLEN, SEQLEN_KV), (SEQLEN_KV, SEQLEN), (SEQLEN_LONG, SEQLEN_LONG))
#: Those on which the first of each kind is tried as well: the lengths of decoding, and a single key.
LENGTHS_SHORT = ((1, SEQLEN_KV), (2, 7), (7, 1), (7, 7))
#: Those for Paged: seqlen_kv is whole pages, of sizes that kernels have.
LENGTHS_PAGED = ((SEQLEN, 64), (1, 512))
PAGE_SIZES = (1, 16, 64, 128, 256)
#: One more than fits the 16 bits that a grid of blocks has on its second and third axis.
MANY_ROWS = (1 << 16) + 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem, and how its operands are made."""

    label: str
    problem: Problem
    proves: str = ""  #: the claim that it exercises
    layout: Layout = "contiguous"
    magnitude: float = 1.0
    empty_rows: bool = False
    bias: AttnBias | None = field(default=None, compare=False)  #: with data, where that cannot be drawn

    def inputs(self, seed: int) -> Inputs:
        return build(
            self.problem,
            seed=seed,
            layout=self.layout,
            magnitude=self.magnitude,
            empty_rows=self.empty_rows,
            bias=self.bias,
        )


def base_problem(capabilities: Capabilities, device: str) -> Problem:
    """A plain problem that the declaration covers; every case changes it in one way."""
    dtype = next((each for each in FIRST_DTYPES if each in capabilities.dtypes), next(iter(capabilities.dtypes)))
    dim = next((each for each in FIRST_DIMS if each in capabilities.head_dims), min(capabilities.head_dims))
    return Problem(
        batch=BATCH,
        seqlen_q=SEQLEN,
        seqlen_kv=SEQLEN,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=dim,
        head_dim_v=dim,
        dtype=dtype,
        device=device,
        compute_capability=compute_capability(None) if device == "cuda" else None,
        scale=dim**-0.5,
    )


def claimed_cases(kernel: Kernel, device: str) -> list[Case]:
    """Every case that the declaration covers; the kernel's own limits (`refuse`) may take some out again."""
    found: list[Case] = []
    for capabilities in kernel.declarations:
        if device not in capabilities.devices and "*" not in capabilities.devices:
            continue
        if not capabilities.fits_compute_capability(base_problem(capabilities, device)):
            continue
        for case in _variations(capabilities, base_problem(capabilities, device)):
            trained = _trained(capabilities, case)
            if not capabilities.refusals(trained.problem):
                found.append(trained)
            elif not capabilities.refusals(case.problem):
                found.append(case)
    labels = [case.label for case in found]
    return [case for i, case in enumerate(found) if case.label not in labels[:i]]


def _trained(capabilities: Capabilities, case: Case) -> Case:
    """The same case with a backward."""
    if not isinstance(capabilities.backward, Backward):
        return case
    bias = case.problem.bias
    held = bias is not None and bias.requires_grad
    return replace(case, problem=replace(case.problem, requires_grad=True, bias_requires_grad=held))


def _variations(capabilities: Capabilities, base: Problem) -> Iterator[Case]:
    for dtype in sorted(capabilities.dtypes, key=str):
        name = str(dtype).removeprefix("torch.")
        yield Case(label=f"dtype {name}", proves=f"dtypes: {name}", problem=replace(base, dtype=dtype))
    yield from _dims(capabilities, base)
    yield from _lengths(capabilities, base)
    for layout in LAYOUTS:
        yield Case(label=f"layout {layout}", problem=base, layout=layout)
    for magnitude in (0.05, 8.0):
        yield Case(label=f"logits times {magnitude**2:g}", problem=base, magnitude=magnitude)
    for scale in (1.0, 0.03):
        yield Case(label=f"scale {scale:g}", problem=replace(base, scale=scale))
    for scale in (0.0, -0.2):  # legal, and where masks are added before the scale, wrong
        yield Case(label=f"scale {scale:g}", problem=replace(base, scale=scale))
    yield from _biases(capabilities, base)
    yield from _options(capabilities, base)
    yield from _many_rows(base)


def _dims(capabilities: Capabilities, base: Problem) -> Iterator[Case]:
    for dim in sizes_of(capabilities.head_dims):
        problem = replace(base, head_dim=dim, head_dim_v=dim, scale=dim**-0.5)
        yield Case(label=f"head_dim {dim}", proves=f"head_dims: {dim}", problem=problem)
    if capabilities.head_dims_v is None:
        return
    for dim in sizes_of(capabilities.head_dims_v):
        if dim != base.head_dim:
            yield Case(label=f"head_dim_v {dim}", proves=f"head_dims_v: {dim}", problem=replace(base, head_dim_v=dim))


def sizes_of(sizes: Collection[int]) -> list[int]:
    """Those of a declared range or set that are worth a problem: its ends, its step, and what tiles are made of."""
    ends: set[int] = set()
    if isinstance(sizes, range):
        ends = {sizes[0], sizes[min(1, len(sizes) - 1)], sizes[-1]}
        ends |= {sizes[(LARGEST_DIM - sizes.start) // sizes.step]} if LARGEST_DIM in sizes else set()
    else:
        ends = {min(sizes), max(sizes)}
    return sorted(size for size in ends | set(DIMS) if size in sizes and size <= LARGEST_DIM)


def _lengths(capabilities: Capabilities, base: Problem) -> Iterator[Case]:
    def case(seqlen_q: int, seqlen_kv: int, **changes: Any) -> Case:
        label = "-".join(f"{name} {value}" for name, value in changes.items())
        problem = replace(base, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, **changes)
        return Case(label=f"lengths {seqlen_q} x {seqlen_kv}{f', {label}' if label else ''}", problem=problem)

    for lengths in ((1, 1), (1, 77), (77, 1), (2, 3), (31, 64), (64, 31), (128, 128), (129, 257), (300, 40)):
        yield case(*lengths)
    yield case(SEQLEN, SEQLEN, batch=1)
    yield case(SEQLEN, SEQLEN, num_heads=1, num_kv_heads=1)
    if capabilities.empty_lengths:
        for name in ("batch", "seqlen_q", "seqlen_kv"):
            yield Case(label=f"empty {name}", proves="empty_lengths", problem=changed(base, name, 0))


def _many_rows(base: Problem) -> Iterator[Case]:
    """The last ones, since they take long."""
    few = replace(base, num_heads=1, num_kv_heads=1)
    yield Case(label=f"{MANY_ROWS} queries", problem=replace(few, batch=1, seqlen_q=MANY_ROWS, seqlen_kv=3))
    yield Case(label=f"batch {MANY_ROWS}", problem=replace(few, batch=MANY_ROWS, seqlen_q=1, seqlen_kv=2))


def changed(problem: Problem, field: str, value: Any) -> Problem:
    """The problem with another value of one field."""
    changes: dict[str, Any] = {field: value}
    return replace(problem, **changes)


def _biases(capabilities: Capabilities, base: Problem) -> Iterator[Case]:
    trains = isinstance(capabilities.backward, Backward) and capabilities.backward.bias_grad
    for declared in sorted(capabilities.biases, key=str):
        name = declared.__name__ if isinstance(declared, type) else repr(declared)
        for seqlen_q, seqlen_kv in _lengths_for(declared):
            problem = replace(base, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
            short = (seqlen_q, seqlen_kv) in LENGTHS_SHORT
            seen: set[object] = set()  # on equal lengths both corners are one
            for bias in examples(declared, problem, trains):
                bound = bias.bind(seqlen_q, seqlen_kv).normalize()
                if bound is None or (not bound.holds_data and bound.key in seen) or (short and _kind(bound) in seen):
                    continue
                seen |= {bound.key, _kind(bound)}
                yield Case(
                    label=f"bias {bias!r} on {seqlen_q} x {seqlen_kv}",
                    proves=f"biases: {name}",
                    problem=replace(problem, bias=bound.without_data()),
                    empty_rows=True,
                    bias=_given(bound),
                )


def _lengths_for(declared: BiasKind) -> tuple[tuple[int, int], ...]:
    if declared is Paged:
        return LENGTHS_PAGED
    return LENGTHS + LENGTHS_SHORT if isinstance(declared, type) else LENGTHS


def _kind(bias: AttnBias) -> object:
    """To a kernel, tensors of truth values or of integers and those of numbers are two kinds."""
    return type(bias), tuple(tensor.is_floating_point() for tensor in bias.held().values())


def _given(bias: AttnBias) -> AttnBias | None:
    """The bias itself where it has its numbers; None where they are to be drawn."""
    return None if any(tensor.is_meta for tensor in bias.held().values()) else bias


def examples(declared: BiasKind, problem: Problem, trains: bool) -> Iterator[AttnBias]:
    """Biases of a declared kind that are legal at these lengths, unbound; tensors on the meta device are to be filled.

    A kind of a stranger's own is exercised by what its class method `examples(problem)` yields, where it has one.
    """
    own = getattr(declared, "examples", None)
    if own is not None:
        yield from own(problem)
    if not isinstance(declared, type):
        yield declared
        return
    seqlen_q, seqlen_kv, heads = problem.seqlen_q, problem.seqlen_kv, problem.num_heads
    equal = seqlen_q == seqlen_kv
    corners = ("top-left", "bottom-right")
    if declared in (Causal, Mask, AttnBias):
        yield from (Causal(corner) for corner in corners)  # type: ignore[arg-type]
    if declared in (Window, Mask, AttnBias):
        for corner in corners:
            for left, right in ((5, 0), (0, 5), (3, 2), (0, 0), (None, 4), (64, 64)):
                yield Window(left, right, corner)  # type: ignore[arg-type]
    if declared in (PrefixLM, Mask, AttnBias):
        yield PrefixLM(7, "top-left")
        yield PrefixLM(torch.arange(problem.batch) * 9, "bottom-right")
    if declared in (BlockMask, Mask, AttnBias):
        yield from _blocks(problem)
    if declared in (Neighborhood, Mask, AttnBias) and equal:
        if seqlen_q < SEQLEN:
            yield Neighborhood(seqlen_q, kernel_size=4, stride=3)
        else:
            yield from _neighborhoods(seqlen_q)
    if declared in (Segments, Mask, AttnBias):
        first = min(seqlen_q, seqlen_kv) // 3
        of_q, of_kv = [first, 1, seqlen_q - first - 1], [1, seqlen_kv - first - 1, first]
        yield Segments(of_q, of_kv)
        yield Segments(of_q, of_kv, within=Causal("bottom-right"))
    if declared in (Intersection, Mask, AttnBias):
        yield Causal("bottom-right") & Window(8, 3, "top-left")
    if declared is Intersection:
        yield KeyPadding(torch.empty(problem.batch, dtype=torch.int64, device="meta")) & Causal("top-left")
    if declared is KeyPadding:
        yield KeyPadding(torch.empty(problem.batch, dtype=torch.int64, device="meta"))
        yield KeyPadding(torch.empty(problem.batch, dtype=torch.int32, device="meta"))
    if declared is Cached:
        for within in (None, Causal("bottom-right"), Window(5, 1, "bottom-right"), Causal("top-left")):
            yield Cached(torch.empty(problem.batch, dtype=torch.int32, device="meta"), within=within)
    if declared is Paged:
        yield from _pages(problem)
    if declared is TensorBias:
        yield from _tensors(problem, trains)
    if declared in (ALiBi, Score, AttnBias):
        yield ALiBi(heads, corner="bottom-right")
        yield ALiBi(heads, torch.empty(heads, device="meta", requires_grad=trains), "top-left")
    if declared in (RelPosTable, Score, AttnBias) and equal:
        yield RelPosTable(torch.empty(heads, 9, device="meta", requires_grad=trains), seqlen_q)
    if declared is Sum:
        yield Causal("top-left") + ALiBi(heads, corner="top-left")
        yield Window(6, 2, "bottom-right") + TensorBias(torch.empty(seqlen_q, seqlen_kv, device="meta"))
        yield Causal("top-left") + TensorBias(torch.empty(problem.num_heads, seqlen_q, seqlen_kv, device="meta"))


def _neighborhoods(seqlen: int) -> Iterator[Neighborhood]:
    yield Neighborhood(seqlen, kernel_size=7)
    yield Neighborhood(seqlen, kernel_size=3, dilation=5)
    yield Neighborhood((seqlen // 3, 3), kernel_size=(4, 3), stride=(3, 1), dilation=(2, 1))
    yield Neighborhood((3, seqlen // 3), kernel_size=3, is_causal=(True, False))


def _blocks(problem: Problem) -> Iterator[BlockMask]:
    """Blocks that no tile is made of; of several rows of them the first is masked, so that queries see nothing."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        of_q, of_kv = (-(-seqlen // size) for seqlen, size in zip((problem.seqlen_q, problem.seqlen_kv), sizes[-2:]))
        blocks = torch.rand(*sizes[:-2], of_q, of_kv, generator=generator) > 0.4
        if blocks.shape[-2] > 1:
            blocks[..., 0, :] = False
        return blocks

    yield BlockMask(drawn(16, 16), 16)
    per_head, full = drawn(problem.batch, problem.num_heads, 12, 20), drawn(problem.batch, 1, 12, 20)
    # What is padding by the mask within is so here, but where a full block sees it; the last blocks are cut off.
    padded = KeyPadding([problem.seqlen_kv * (b + 1) // (problem.batch + 1) for b in range(problem.batch)])
    yield BlockMask(drawn(12, 20), (12, 20), within=padded)
    yield BlockMask(per_head, (12, 20), full=full, within=Causal("bottom-right"))
    full = full.clone()
    full[..., 1:] = False  # were there full blocks everywhere, they would see every key, and none were padding
    yield BlockMask(per_head, (12, 20), full=full, within=padded)


def _pages(problem: Problem) -> Iterator[Paged]:
    withins = (None, Causal("bottom-right"), Window(5, 1, "bottom-right"), Causal("top-left"))
    sizes = [size for size in PAGE_SIZES if problem.seqlen_kv % size == 0]
    for i, size in enumerate(sizes):
        for within in withins if size == 16 else (withins[i % 2],):
            table = torch.empty(problem.batch, problem.seqlen_kv // size, dtype=torch.int32, device="meta")
            seqlens = torch.empty(problem.batch, dtype=torch.int32, device="meta")
            yield Paged(table, seqlens, size, within=within)


def _tensors(problem: Problem, trains: bool) -> Iterator[TensorBias]:
    full = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_kv)
    few = full, full[2:], (full[0], 1, 1, full[3])
    many = (1, *full[1:]), (full[0], 1, *full[2:]), (full[2], 1)
    for shape in (*few, *many) if full[2:] in LENGTHS[:2] else few:
        yield TensorBias(torch.empty(shape, dtype=torch.bool, device="meta"))
        yield TensorBias(torch.empty(shape, dtype=problem.dtype, device="meta", requires_grad=trains))
    if problem.dtype is not torch.float32:
        yield TensorBias(torch.empty(full, dtype=torch.float32, device="meta"))


def _options(capabilities: Capabilities, base: Problem) -> Iterator[Case]:
    if capabilities.gqa:
        for heads, kv_heads in ((6, 3), (6, 2), (6, 1), (8, 2)):
            problem = replace(base, num_heads=heads, num_kv_heads=kv_heads)
            yield Case(label=f"heads {heads}:{kv_heads}", proves="gqa", problem=problem)
    if capabilities.softcap:
        for softcap in (0.5, 30.0):
            problem = replace(base, softcap=softcap)
            yield Case(label=f"softcap {softcap:g}", proves="softcap", problem=problem, magnitude=3.0)
        for both, bias in _one_bias_each(capabilities, replace(base, softcap=0.5)):
            yield Case(label=f"softcap 0.5, {bias!r}", proves="softcap", problem=both, magnitude=3.0, bias=_given(bias))
    if capabilities.return_lse:
        problem = replace(base, return_lse=True)
        yield Case(label="lse", proves="return_lse", problem=problem)
        yield Case(label="lse of large logits", proves="return_lse", problem=problem, magnitude=8.0)
        for both, bias in _one_bias_each(capabilities, problem):
            yield Case(label=f"lse, {bias!r}", proves="return_lse", problem=both, empty_rows=True, bias=_given(bias))
    for both, bias in _one_bias_each(capabilities, base):
        for scale in (0.0, -0.2):  # a mask that is added before the scale is none
            yield Case(label=f"scale {scale:g}, {bias!r}", problem=replace(both, scale=scale), bias=_given(bias))
    if capabilities.strided_head_dim:
        yield Case(label="strided", proves="strided_head_dim", problem=replace(base, strided_head_dim=True))


def _one_bias_each(capabilities: Capabilities, problem: Problem) -> Iterator[tuple[Problem, AttnBias]]:
    """The problem with each of the first biases of every declared kind, and that bias."""
    for declared in sorted(capabilities.biases, key=str):
        lengths = next(iter(_lengths_for(declared)))
        there = replace(problem, seqlen_q=lengths[0], seqlen_kv=lengths[1])
        bound = [bias.bind(*lengths).normalize() for bias in examples(declared, there, False)]
        for bias in [bias for bias in bound if bias is not None][:2]:
            yield replace(there, bias=bias.without_data()), bias
