"""What a call costs beside the kernel on CUDA, and what each kind of bias takes there, against torch's own op.

Taken in turns, as all figures of benchmarks/timing.py. For dispatch, the smallest problem there is: the device is done
long before the host, so that what is seen is the host. For biases, a problem of which the device takes long; torch's op
gets the same mask, dense and boolean, which is built outside of the timing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import sources
import torch
from attn_core import AttnBias, Causal, Neighborhood, PrefixLM, Segments, Window, attention, explain
from torch import Tensor

sys.path.append(str(sources.ROOT / "benchmarks"))
from timing import SEED, Contender, over, take_turns

#: batch, heads, head_dim of the large problem, and its lengths.
BATCH, HEADS, DIM, SEQLENS = 2, 16, 64, (2048, 8192)
CALLS_SMALL, CALLS_LARGE = 200, 5

_sdpa = torch.nn.functional.scaled_dot_product_attention


def run(options: argparse.Namespace, *, device: str = "cuda", seqlens: tuple[int, ...] = SEQLENS) -> dict[str, Any]:
    """Both tables, a row per path or bias; a row that cannot be taken says why, and the step has failed."""
    torch.manual_seed(SEED)
    settle = torch.cuda.synchronize if device == "cuda" else None
    rows = dispatch(options.rounds, device, settle)
    biased = [row for seqlen in seqlens for row in biases(options, device, seqlen, settle)]
    failed = [f"{row['bias']} of {row['seqlen']}" for row in biased if "reason" in row]
    told = {"outcome": "failed", "reason": f"no figure for {', '.join(failed)}"} if failed else {"outcome": "passed"}
    return told | {"seed": SEED, "rounds": options.rounds, "dispatch": rows, "biases": biased}


def dispatch(rounds: int, device: str, settle: Callable[[], object] | None) -> list[dict[str, Any]]:
    """Microseconds of the host per call, over torch's op with the same meaning between the same permutes."""
    query, key, value = (torch.randn(1, 4, 1, 8, device=device, dtype=torch.float16) for _ in range(3))
    bias = Causal("top-left")

    def bare(is_causal: bool = False) -> Tensor:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _sdpa(q, k, v, is_causal=is_causal).transpose(1, 2)

    contenders = [
        Contender(name="torch", call=bare),
        Contender(name="torch, causal", call=partial(bare, True)),
        Contender(name="attention", call=lambda: attention(query, key, value), over="torch"),
        Contender(name="attention, causal", call=lambda: attention(query, key, value, bias), over="torch, causal"),
    ]
    with torch.no_grad():
        taken = take_turns(contenders, rounds=rounds, calls=CALLS_SMALL, settle=settle)
        kernel = str(explain(query, key, value).chosen)
    rows = []
    for contender in contenders:
        row = {"path": contender.name, "µs": statistics.median(taken[contender.name])}
        if contender.over is not None:
            median, spread = over(taken, contender.name, contender.over)
            row |= {"over": contender.over, "µs over": median, "±": spread, "kernel": kernel}
        rows.append(row)
    return rows


def kinds(seqlen: int) -> dict[str, AttnBias | None]:
    """The biases that are compared, for a sequence of that length."""
    side = 1 << (seqlen.bit_length() - 1) // 2
    return {
        "none": None,
        "causal": Causal("top-left"),
        "window 256": Window(256, 0, "top-left"),
        "prefix": PrefixLM([seqlen // 8] * BATCH),
        "8 documents": Segments([seqlen // 8] * 8),
        "neighborhood 7 x 7": Neighborhood((side, seqlen // side), kernel_size=7),
    }


def biases(
    options: argparse.Namespace, device: str, seqlen: int, settle: Callable[[], object] | None
) -> list[dict[str, Any]]:
    """Milliseconds of the chosen kernel and of torch's op with the dense mask; forward, bfloat16."""
    shape = (BATCH, seqlen, HEADS, DIM)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    rows = []
    for name, bias in kinds(seqlen).items():
        row: dict[str, Any] = {"bias": name, "seqlen": seqlen}
        try:
            with torch.no_grad():
                dense = None if bias is None else bias.bind(seqlen, seqlen).materialize(torch.device(device))
                row["kernel"] = str(explain(query, key, value, bias).chosen)
                contenders = [
                    Contender(name="torch", call=partial(_sdpa, q, k, v, attn_mask=dense)),
                    Contender(name="attention", call=partial(attention, query, key, value, bias), over="torch"),
                ]
                taken = take_turns(contenders, rounds=options.rounds, calls=CALLS_LARGE, settle=settle)
        except Exception as error:
            rows.append(row | {"reason": f"{type(error).__name__}: {error}"})
            continue
        median, spread = over(taken, "attention", "torch")
        row |= {f"{name}, ms": statistics.median(taken[name]) / 1e3 for name in ("torch", "attention")}
        rows.append(row | {"difference, ms": median / 1e3, "±": spread / 1e3})
    return rows
