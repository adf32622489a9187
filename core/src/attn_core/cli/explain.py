"""`attn explain`: which kernel would run a problem, without having its tensors."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import click
import torch

from ..bias import AttnBias, Causal, KeyPadding, Paged, TensorBias, Window
from ..dispatch import ATTENTION, asked
from ..door import compute_capability
from ..environment import ALLOWABLE
from ..explain import Explanation, explain_problem
from ..problem import Problem
from ..scope import allow, prefer
from .console import console, print_json
from .expression import parse
from .lengths import told

DTYPES = sorted(
    name
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and value.is_floating_point and str(value) == f"torch.{name}"
)
CORNERS = ("top-left", "bottom-right")
#: A dense tensor, said by what it is; another bias is written as an expression.
DENSE = ("bool", "float", "float-grad")
BATCH, SEQLEN, HEADS = 1, 1024, 8


def window_flag(ctx: click.Context, param: click.Parameter, value: str | None) -> Window | None:
    """LEFT,RIGHT[,CORNER]; "inf" for no limit on that side."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+|inf),(\d+|inf)(?:,(top-left|bottom-right))?", value.replace(" ", ""))
    if match is None:
        raise click.BadParameter(f"{value!r} is not LEFT,RIGHT[,CORNER], such as 256,0 or 256,inf,bottom-right")
    left, right = (None if side == "inf" else int(side) for side in match.groups()[:2])
    return Window(left, right, match[3])  # type: ignore[arg-type]


def capability_flag(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """MAJOR.MINOR of a CUDA device."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d)", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not MAJOR.MINOR, such as 9.0")
    return int(match[1]), int(match[2])


def bias_flag(ctx: click.Context, param: click.Parameter, value: str | None) -> str | AttnBias | None:
    """One of DENSE, or an expression."""
    return value if value is None or value in DENSE else parse(value)


@click.command()
@click.option("--batch", type=int, show_default=f"{BATCH}, or that of --bias")
@click.option("--seqlen", type=int, show_default=f"{SEQLEN}, or that of --bias", help="Of queries and keys.")
@click.option("--seqlen-q", type=int, help="Of queries, where it differs.")
@click.option("--seqlen-kv", type=int, help="Of keys and values, where it differs.")
@click.option("--heads", type=int, show_default=f"{HEADS}, or those of --bias", help="Of queries.")
@click.option("--kv-heads", type=int, help="Of keys and values; default: as many as of queries.")
@click.option("--head-dim", default=64, show_default=True)
@click.option("--head-dim-v", type=int, help="Of values; default: the same.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), metavar="NAME", default="float32", show_default=True, help="Such as bfloat16."
)
@click.option("--device", default="cpu", show_default=True, help="Device type: cpu, cuda, mps, … It need not be there.")
@click.option(
    "--compute-capability",
    "capability",
    metavar="MAJOR.MINOR",
    callback=capability_flag,
    help="Of the CUDA device, such as 9.0; default: this machine's, where it has one.",
)
@click.option("--causal", type=click.Choice(CORNERS), help="Causal mask, and where its diagonal starts.")
@click.option(
    "--window",
    metavar="LEFT,RIGHT[,CORNER]",
    callback=window_flag,
    help="Sliding window: keys on each side of the diagonal, such as 256,0; inf for no limit.",
)
@click.option("--key-padding", is_flag=True, help="Each batch entry has keys up to a length of its own.")
@click.option(
    "--bias",
    metavar="EXPRESSION",
    callback=bias_flag,
    help="Any bias, written as for attn show; or a dense tensor: bool, float, or float-grad, which needs a gradient.",
)
@click.option("--softcap", type=float, help="Bound of the logits.")
@click.option("--scale", type=float, help="Of the logits; default: head_dim ** -0.5.")
@click.option("--dropout", default=0.0, show_default=True, help="Probability of dropping a weight.")
@click.option("--lse", is_flag=True, help="The log-sum-exp is asked for, too.")
@click.option("--grad", is_flag=True, help="A gradient to query, key and value is needed.")
@click.option("--deterministic", is_flag=True, help="As under torch.use_deterministic_algorithms(True).")
@click.option("--kernel", help="Insist on this one.")
@click.option("--prefer", "preferred", multiple=True, metavar="PATTERN", help="Kernels that come first; repeatable.")
@click.option("--allow", "allowed", multiple=True, type=click.Choice(ALLOWABLE), help="What may be chosen, too.")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@click.pass_context
def explain(ctx: click.Context, /, as_json: bool, **flags: Any) -> None:
    """Tell which kernel would run a problem, and why not each of the others.

    The problem is described by flags; nothing is run, and the device need not be in this machine. Exit code 1 if no
    kernel takes it.

    \b
    Examples:
        attn explain --seqlen 4096 --heads 32 --kv-heads 8 --causal top-left
        attn explain --seqlen 100000 --window 256,256 --dtype bfloat16
        attn explain --bias "Segments([500, 900, 400]) & Causal()" --lse
        attn explain --device cuda --compute-capability 9.0 --dtype float16 --grad
    """
    explanation = explanation_of(**flags)
    if as_json:
        print_json(explanation.to_dict())
    else:
        console().print(explanation)
    if explanation.chosen is None:
        ctx.exit(1)


def explanation_of(
    *, kernel: str | None, preferred: tuple[str, ...], allowed: tuple[str, ...], **flags: Any
) -> Explanation:
    problem = problem_of(**flags)
    with ExitStack() as scopes:
        if preferred:
            scopes.enter_context(prefer(*preferred))
        if allowed:
            scopes.enter_context(allow(*allowed))
        return explain_problem(problem, kernel=kernel)


def problem_of(
    *,
    batch: int | None,
    seqlen: int | None,
    seqlen_q: int | None,
    seqlen_kv: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int,
    head_dim_v: int | None,
    dtype: str,
    device: str,
    capability: tuple[int, int] | None,
    softcap: float | None,
    scale: float | None,
    dropout: float,
    lse: bool,
    grad: bool,
    deterministic: bool,
    bias: str | AttnBias | None,
    **masks: Any,
) -> Problem:
    """The problem that the flags describe, checked at the same door as a call: by tensors without data."""
    kind = _device_type(device)
    of_bias: tuple[int | None, int | None, int, int] = (None, None, 1, 1)
    if isinstance(bias, AttnBias):
        of_bias = (*told(bias), *bias.batch_and_heads)
    seqlen_q = _first(seqlen_q, seqlen, of_bias[0], SEQLEN)
    seqlen_kv = _first(seqlen_kv, seqlen, of_bias[1], SEQLEN)
    batch = _first(batch, BATCH if of_bias[2] == 1 else of_bias[2])
    heads = _first(heads, HEADS if of_bias[3] == 1 else of_bias[3])
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    sizes = {"--batch": batch, "--seqlen-q": seqlen_q, "--seqlen-kv": seqlen_kv, "--heads": heads}
    sizes |= {"--kv-heads": kv_heads, "--head-dim": head_dim, "--head-dim-v": head_dim_v}
    for flag, size in sizes.items():
        if size < 0:
            raise click.UsageError(f"{flag} must not be negative, got {size}")

    def operand(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", requires_grad=grad)

    pages = bias.paged if isinstance(bias, AttnBias) else None
    rows = (batch, seqlen_kv) if pages is None else (_num_pages(pages), pages.page_size)
    checked = asked(
        ATTENTION,
        operand(batch, seqlen_q, heads, head_dim),
        operand(*rows, kv_heads, head_dim),
        operand(*rows, kv_heads, head_dim_v),
        _bias(batch, seqlen_q, seqlen_kv, getattr(torch, dtype), bias=bias, **masks),
        scale,
        softcap,
        dropout,
        lse,
    )
    return replace(
        checked,
        device=kind,
        compute_capability=_capability(kind, given=capability),
        deterministic=deterministic or checked.deterministic,
    )


def _bias(
    batch: int,
    seqlen_q: int,
    seqlen_kv: int,
    dtype: torch.dtype,
    *,
    causal: str | None,
    window: Window | None,
    key_padding: bool,
    bias: str | AttnBias | None,
) -> AttnBias | None:
    given = {"--causal": causal, "--window": window, "--key-padding": key_padding or None, "--bias": bias}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise click.UsageError(
            f"{' and '.join(named)}: one at a time; --bias takes combinations, such as 'Causal() & Window(256, 0)'"
        )
    if causal is not None:
        return Causal(causal)  # type: ignore[arg-type]
    if key_padding:
        return KeyPadding(torch.empty(batch, dtype=torch.int64, device="meta"))
    if isinstance(bias, AttnBias):
        # What its values say is looked at now; behind it there is no data, as there is none of the operands.
        simplest = bias.bind(seqlen_q, seqlen_kv).normalize()
        return None if simplest is None else simplest.without_data()
    if bias is not None:
        kind = torch.bool if bias == "bool" else dtype
        shape = (1, 1, seqlen_q, seqlen_kv)
        return TensorBias(torch.empty(shape, dtype=kind, device="meta", requires_grad=bias == "float-grad"))
    return window


def _first(*given: int | None) -> int:
    """The first that is given."""
    return next(value for value in given if value is not None)


def _num_pages(pages: Paged) -> int:
    """As many as the table speaks of."""
    return max(1, int(pages.page_table.max()) + 1) if pages.page_table.numel() else 1


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise click.BadParameter(f"torch knows no device {device!r}", param_hint="--device") from error


def _capability(device: str, *, given: tuple[int, int] | None) -> tuple[int, int] | None:
    if given is not None and device != "cuda":
        raise click.UsageError(f"--compute-capability is for --device cuda, got --device {device}")
    return given if given is not None or device != "cuda" else compute_capability(None)
