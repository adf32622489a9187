"""Compiles every kernel for every architecture, without a GPU, and looks at what the cubins say of themselves.

    python plugins/attn-cuda-ref/checks/compile_gate.py                     all of them, by one core in 90 minutes
    python plugins/attn-cuda-ref/checks/compile_gate.py --every 20          every twentieth
    python plugins/attn-cuda-ref/checks/compile_gate.py --arch sm_90a       of one architecture
    python plugins/attn-cuda-ref/checks/compile_gate.py --compiler nvrtc    by one compiler

NVRTC compiles them, which is what users run, in half an hour; and nvcc after it, where there is one, in an hour. A text
that does not compile ends it, with the compiler's words. So do spills where head_dim is at most 128: that is a count,
the same on every machine. Registers and seconds are printed and judged by nobody; the seconds are a core's own, so that
what else runs beside does not count.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import torch
from attn_core import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    KeyPadding,
    Neighborhood,
    PrefixLM,
    RelPosTable,
    Segments,
    TensorBias,
    Window,
)
from attn_cuda_ref import compiler
from attn_cuda_ref.compiler import Asked, Nvrtc
from attn_cuda_ref.constants import constants
from attn_cuda_ref.translate import translated

sys.path.insert(0, str(Path(__file__).parent))
import nvcc
from cubin import Usage, usage
from nvcc import Nvcc

ARCHITECTURES = ("sm_75", "sm_80", "sm_90a", "sm_100a")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (32, 64, 96, 128, 256)
#: Up to this head_dim nothing may spill.
WITHOUT_SPILLS = 128
ENTRIES = ("simple_forward", "simple_key_value_gradient", "simple_query_gradient")
TRAINED_ENTRIES = ("simple_exact_delta", "simple_bias_gradient")
TABLE_ENTRY = "simple_table_gradient"
TOKENS = 64


def biases() -> dict[str, AttnBias | None]:
    """One of each kind; lengths and tensors are arguments and change no text."""
    blocks = torch.ones(4, 4, dtype=torch.bool)
    plain: dict[str, AttnBias | None] = {
        "none": None,
        "causal": Causal("bottom-right"),
        "window": Window(5, 2, "top-left"),
        "prefix": PrefixLM(7, "top-left"),
        "key padding": KeyPadding([TOKENS]),
        "cached": Cached([TOKENS], within=Causal("bottom-right")),
        "segments": Segments([24, 40], within=Causal()),
        "neighborhood 1-D": Neighborhood(TOKENS, kernel_size=7, stride=2, dilation=3),
        "neighborhood 2-D": Neighborhood((8, 8), kernel_size=(3, 5), dilation=(2, 1)),
        "neighborhood 3-D": Neighborhood((4, 4, 4), kernel_size=3, is_causal=(True, False, False)),
        "blocks": BlockMask(blocks, 16, full=blocks, within=Causal("top-left")),
        "boolean tensor": TensorBias(torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
        "float tensor": TensorBias(torch.zeros(TOKENS, TOKENS)),
        "alibi": ALiBi(2),
        "table 2-D": RelPosTable(torch.zeros(2, 15, 15), (8, 8)),
        "causal & key padding": Causal("top-left") & KeyPadding([TOKENS]),
        "causal + alibi + table": Causal("top-left") + ALiBi(2) + RelPosTable(torch.zeros(2, 15), TOKENS),
    }
    return {name: bias and bias.bind(TOKENS, TOKENS) for name, bias in plain.items()}


class Compilation(NamedTuple):
    entry: str
    bias: str
    dtype: torch.dtype
    head_dim: int  #: 0 where the text does not depend on it
    softcap: bool
    arch: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.entry}, {dtype}, head_dim {self.head_dim}, {self.bias}{', softcap' * self.softcap}, {self.arch}"

    def asked(self, version: tuple[int, int]) -> Asked:
        """What a compiler of this version is given."""
        bias = translated(biases()[self.bias], torch.device("cpu"))
        if self.entry == TABLE_ENTRY:
            made = {"TABLE": next(score for score in bias.scores if score.startswith("Table<"))}
        else:
            made = constants(self.dtype, self.head_dim, self.head_dim, bias, self.softcap)
        return Asked.of(f'#include "{self.entry}.cuh"\n', self.entry, made, self.arch, version)


class Result(NamedTuple):
    of: Compilation
    usage: Usage
    seconds: float  #: of a core


def compilations(architectures: Sequence[str]) -> Iterator[Compilation]:
    for arch, (name, bias) in product(architectures, biases().items()):
        trained = bias is not None and bool(bias.scores)
        for dtype, dim in product(DTYPES, DIMS):
            for entry in (*ENTRIES, *(TRAINED_ENTRIES if trained else ())):
                yield Compilation(entry, name, dtype, dim, False, arch)
                if name == "none":
                    yield Compilation(entry, name, dtype, dim, True, arch)
            if name == "none":
                yield Compilation("simple_delta", name, dtype, dim, False, arch)
        if bias is not None and any(isinstance(score, RelPosTable) for score in bias.scores):
            yield Compilation(TABLE_ENTRY, name, torch.float32, 0, False, arch)


def compiled(each: Compilation, by: Nvrtc | Nvcc) -> Result:
    began = core_seconds()
    cubin = by.compile(each.asked(by.version))
    return Result(each, usage(cubin), core_seconds() - began)


def compiled_with_progress(each_of: Sequence[Compilation], by: Nvrtc | Nvcc, name: str) -> list[Result]:
    """All of them, with a line on standard error after each bias of an architecture: a compiler takes up to an hour."""
    results: list[Result] = []
    for (arch, bias), group in groupby(each_of, key=lambda each: (each.arch, each.bias)):
        results += [compiled(each, by) for each in group]
        print(f"{name}: {arch}, {bias}: {len(results)} of {len(each_of)}", file=sys.stderr, flush=True)
    return results


def core_seconds() -> float:
    """What this process and those that it started have computed so far."""
    of = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in of)


def report(by: str, results: Sequence[Result]) -> None:
    """Prints how many there were, and by entry, head_dim and bias what they take."""
    rows: dict[tuple[str, int], list[Result]] = defaultdict(list)
    by_bias: dict[str, list[Result]] = defaultdict(list)
    for each in results:
        rows[each.of.entry, each.of.head_dim].append(each)
        by_bias[each.of.bias].append(each)
    print(f"{by}: {len(results)} kernels compiled")
    print(f"{'entry':28} {'head_dim':>8} {'kernels':>7} {'registers':>9} {'stack':>6} {'seconds, median and most':>25}")
    for (entry, dim), values in sorted(rows.items()):
        registers = max(each.usage.registers for each in values)
        stack = max(each.usage.stack_bytes for each in values)
        print(f"{entry:28} {dim:8} {len(values):7} {registers:9} {stack:6} {told(values):>25}")
    print(f"{'bias':28} {'kernels':>16} {'seconds, median and most':>42}")
    for bias, values in by_bias.items():
        print(f"{bias:28} {len(values):16} {told(values):>42}")


def told(values: Sequence[Result]) -> str:
    seconds = [each.seconds for each in values]
    return f"{statistics.median(seconds):.2f} {max(seconds):.2f}"


def spilled(results: Sequence[Result]) -> list[Result]:
    """Those that spill and must not."""
    return [each for each in results if each.usage.stack_bytes and each.of.head_dim <= WITHOUT_SPILLS]


def compilers(wanted: Sequence[str] | None) -> dict[str, Nvrtc | Nvcc]:
    """The wanted ones by their names; where nothing is said, NVRTC, and nvcc where it is there.

    Raises CudaError where there is no NVRTC, LookupError where nvcc is wanted and not there.
    """
    found: dict[str, Nvrtc | Nvcc] = {}
    if not wanted or "nvrtc" in wanted:
        found["NVRTC"] = compiler.nvrtc()
    if not wanted or "nvcc" in wanted:
        program = nvcc.find()
        if program is not None:
            found["nvcc"] = Nvcc(program)
        elif wanted:
            raise LookupError("there is none: neither on PATH nor where CUDA_HOME says, nor in /usr/local/cuda")
        else:
            print("nvcc: there is none, so NVRTC alone compiles")
    return found


def known(every: Sequence[Compilation], by: Nvrtc | Nvcc, name: str) -> Sequence[Compilation]:
    """All of them for NVRTC, since an architecture that it lacks is an error. For nvcc, of any age, those of
    architectures that it has; the others are told."""
    if isinstance(by, Nvrtc):
        return every
    numbers = by.architectures()
    left_out = {each.arch for each in every if int(each.arch.strip("sm_a")) not in numbers}
    for arch in sorted(left_out):
        print(f"{name} does not know {arch}: left out")
    return [each for each in every if each.arch not in left_out]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every architecture, without a GPU.")
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="each N-th of them only")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with the N-th, from 0")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="of this architecture only")
    parser.add_argument("--compiler", action="append", choices=("nvrtc", "nvcc"), help="by this compiler only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        chosen = compilers(options.compiler)
    except LookupError as error:
        parser.error(f"--compiler nvcc: {error}")
    every = list(compilations(options.arch or ARCHITECTURES))[options.first :: options.every]
    count, wrong = 0, 0
    for kind, by in chosen.items():
        name = f"{kind} {'.'.join(map(str, by.version))}"
        results = compiled_with_progress(known(every, by, name), by, name)
        report(name, results)
        for each in spilled(results):
            what = f"{each.usage.stack_bytes} bytes of stack, {each.usage.registers} registers"
            print(f"spills: {name}: {each.of}: {what}")
            wrong += 1
        count += len(results)
    return 1 if wrong or not count else 0


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
