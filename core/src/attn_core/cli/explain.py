"""`attn explain`: which kernel would run a problem, without having its tensors."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import click
import torch

from ..bias import AttnBias, Causal, KeyPadding, TensorBias, Window
from ..dispatch import ATTENTION, asked
from ..door import compute_capability
from ..explain import Explanation, explain_problem
from ..problem import Problem
from ..scope import allow, prefer
from .console import console, print_json

DTYPES = sorted(
    name
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and value.is_floating_point and str(value) == f"torch.{name}"
)
CORNERS = ("top-left", "bottom-right")


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


@click.command()
@click.option("--batch", default=1, show_default=True)
@click.option("--seqlen", default=1024, show_default=True, help="Of queries and keys.")
@click.option("--seqlen-q", type=int, help="Of queries, where it differs.")
@click.option("--seqlen-kv", type=int, help="Of keys and values, where it differs.")
@click.option("--heads", default=8, show_default=True, help="Of queries.")
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
    type=click.Choice(["bool", "float", "float-grad"]),
    help="A dense tensor: a boolean mask, a floating bias, or one that needs a gradient.",
)
@click.option("--softcap", type=float, help="Bound of the logits.")
@click.option("--scale", type=float, help="Of the logits; default: head_dim ** -0.5.")
@click.option("--dropout", default=0.0, show_default=True, help="Probability of dropping a weight.")
@click.option("--lse", is_flag=True, help="The log-sum-exp is asked for, too.")
@click.option("--grad", is_flag=True, help="A gradient to query, key and value is needed.")
@click.option("--deterministic", is_flag=True, help="As under torch.use_deterministic_algorithms(True).")
@click.option("--kernel", help="Insist on this one.")
@click.option("--prefer", "preferred", multiple=True, metavar="PATTERN", help="Kernels that come first; repeatable.")
@click.option("--allow", "allowed", multiple=True, type=click.Choice(["approximate"]), help="What may be chosen, too.")
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
    batch: int,
    seqlen: int,
    seqlen_q: int | None,
    seqlen_kv: int | None,
    heads: int,
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
    **masks: Any,
) -> Problem:
    """The problem that the flags describe, checked at the same door as a call: by tensors without data."""
    kind = _device_type(device)
    seqlen_q = seqlen if seqlen_q is None else seqlen_q
    seqlen_kv = seqlen if seqlen_kv is None else seqlen_kv
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    sizes = {"--batch": batch, "--seqlen-q": seqlen_q, "--seqlen-kv": seqlen_kv, "--heads": heads}
    sizes |= {"--kv-heads": kv_heads, "--head-dim": head_dim, "--head-dim-v": head_dim_v}
    for flag, size in sizes.items():
        if size < 0:
            raise click.UsageError(f"{flag} must not be negative, got {size}")

    def operand(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", requires_grad=grad)

    checked = asked(
        ATTENTION,
        operand(batch, seqlen_q, heads, head_dim),
        operand(batch, seqlen_kv, kv_heads, head_dim),
        operand(batch, seqlen_kv, kv_heads, head_dim_v),
        _bias(batch, seqlen_q, seqlen_kv, getattr(torch, dtype), **masks),
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
    bias: str | None,
) -> AttnBias | None:
    given = {"--causal": causal, "--window": window, "--key-padding": key_padding or None, "--bias": bias}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)}: one at a time; for a combination, say --bias bool")
    if causal is not None:
        return Causal(causal)  # type: ignore[arg-type]
    if key_padding:
        return KeyPadding(torch.empty(batch, dtype=torch.int64, device="meta"))
    if bias is not None:
        kind = torch.bool if bias == "bool" else dtype
        shape = (1, 1, seqlen_q, seqlen_kv)
        return TensorBias(torch.empty(shape, dtype=kind, device="meta", requires_grad=bias == "float-grad"))
    return window


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise click.BadParameter(f"torch knows no device {device!r}", param_hint="--device") from error


def _capability(device: str, *, given: tuple[int, int] | None) -> tuple[int, int] | None:
    if given is not None and device != "cuda":
        raise click.UsageError(f"--compute-capability is for --device cuda, got --device {device}")
    return given if given is not None or device != "cuda" else compute_capability(None)
