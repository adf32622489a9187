"""Compiles every kernel for every architecture, without a GPU, and looks at what the cubins say of themselves.

    python plugins/attn-cuda-ref/checks/compile_gate.py                     all of them, in some minutes
    python plugins/attn-cuda-ref/checks/compile_gate.py --every 20          every twentieth
    python plugins/attn-cuda-ref/checks/compile_gate.py --arch sm_90a       of one architecture

A text that does not compile ends it, with the compiler's words. So do spills where head_dim is at most 128: that is a
count, the same on every machine. Registers and seconds are printed and judged by nobody; the seconds are a core's own,
so that what else runs beside does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
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
from attn_cuda_ref.constants import constants
from attn_cuda_ref.translate import translated

sys.path.insert(0, str(Path(__file__).parent))
from cubin import Usage, usage

ARCHITECTURES = ("sm_75", "sm_80", "sm_90a", "sm_100a")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (32, 64, 96, 128, 256)
#: Up to this head_dim nothing may spill.
WITHOUT_SPILLS = 128
ENTRIES = ("simple_forward", "simple_key_value_gradient", "simple_query_gradient")
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
    head_dim: int
    softcap: bool
    arch: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.entry}, {dtype}, head_dim {self.head_dim}, {self.bias}{', softcap' * self.softcap}, {self.arch}"


def compilations(architectures: tuple[str, ...]) -> Iterator[Compilation]:
    for arch, (name, bias), dtype, dim in product(architectures, biases().items(), DTYPES, DIMS):
        trained = bias is not None and bool(bias.scores)
        for entry in (*ENTRIES, *(("simple_exact_delta", "simple_bias_gradient") if trained else ())):
            yield Compilation(entry, name, dtype, dim, False, arch)
            if name == "none":
                yield Compilation(entry, name, dtype, dim, True, arch)
        if name == "none":
            yield Compilation("simple_delta", name, dtype, dim, False, arch)


def compiled(each: Compilation) -> tuple[Usage, float]:
    """What the cubin says, and the seconds of a core that it took."""
    bias = translated(biases()[each.bias], torch.device("cpu"))
    made = constants(each.dtype, each.head_dim, each.head_dim, bias, each.softcap)
    source = f'#include "{each.entry}.cuh"\n'
    nvrtc = compiler.nvrtc()
    began = time.process_time()
    cubin = nvrtc.compile(compiler.Asked.of(source, each.entry, made, each.arch, nvrtc.version))
    return usage(cubin), time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every architecture, without a GPU.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th of them only")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with the N-th")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="of this architecture only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, int], list[tuple[Usage, float]]] = defaultdict(list)
    by_bias: dict[str, list[float]] = defaultdict(list)
    spilled = []
    every = list(compilations(tuple(options.arch or ARCHITECTURES)))[options.first :: options.every]
    for each in every:
        found, seconds = compiled(each)
        rows[each.entry, each.head_dim].append((found, seconds))
        by_bias[each.bias].append(seconds)
        if found.stack_bytes:
            spilled.append((each, found))
    print(f"NVRTC {'.'.join(map(str, compiler.nvrtc().version))}: {len(every)} kernels compiled")
    print(f"{'entry':28} {'head_dim':>8} {'kernels':>7} {'registers':>9} {'stack':>6} {'seconds, median and most':>25}")
    for (entry, dim), values in sorted(rows.items()):
        registers = max(found.registers for found, _ in values)
        stack = max(found.stack_bytes for found, _ in values)
        seconds = [taken for _, taken in values]
        told = f"{statistics.median(seconds):.2f} {max(seconds):.2f}"
        print(f"{entry:28} {dim:8} {len(values):7} {registers:9} {stack:6} {told:>25}")
    print(f"{'bias':28} {'kernels':>16} {'seconds, median and most':>42}")
    for bias, taken in by_bias.items():
        told = f"{statistics.median(taken):.2f} {max(taken):.2f}"
        print(f"{bias:28} {len(taken):16} {told:>42}")
    wrong = [(each, found) for each, found in spilled if each.head_dim <= WITHOUT_SPILLS]
    for each, found in wrong:
        print(f"spills: {each}: {found.stack_bytes} bytes of stack, {found.registers} registers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
