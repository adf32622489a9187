"""`attn report`: what would run a model's attention, where, and why."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..environment import ALLOWABLE
from ..errors import AttnError, InputError
from ..explain import Explanation, Verdict, explain_problem
from ..integrations.hosts import HOSTS, check_version
from ..problem import Problem
from ..record import Recorder, Row, record
from ..scope import allow, prefer
from .console import console, print_json, table
from .report_models import Wanted, build, inputs_of, library_of

#: Which a whole model computes in.
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Setting(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`NAME=VALUE`, the value as Python writes it, or else a word."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"must be NAME=VALUE, such as num_hidden_layers=2, got {value!r}", param, ctx)
        try:
            return name, literal_eval(text)
        except (ValueError, SyntaxError):
            return name, text


@click.command()
@click.argument("model")
@click.option("--batch", type=click.IntRange(1), metavar="N", default=1, show_default=True)
@click.option("--size", type=click.IntRange(1), metavar="PIXELS", help="Of images; default: the model's own.")
@click.option(
    "--seqlen", type=click.IntRange(1), metavar="N", help="Tokens, of text; default: 128, or as many as it takes."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--grad", is_flag=True, help="As in training: gradients are needed.")
@click.option("--set", "settings", multiple=True, type=Setting(), help="An argument of the model, or of its config.")
@click.option("--torch", "with_torch", is_flag=True, help="Redirect what calls torch's attention by itself, too.")
@click.option("--prefer", "preferred", multiple=True, metavar="PATTERN", help="Kernels that come first; repeatable.")
@click.option("--allow", "allowed", multiple=True, type=click.Choice(ALLOWABLE), help="What may be chosen, too.")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
def report(
    model: str,
    batch: int,
    size: int | None,
    seqlen: int | None,
    dtype: str,
    device: str,
    grad: bool,
    settings: tuple[tuple[str, Any], ...],
    with_torch: bool,
    preferred: tuple[str, ...],
    allowed: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell which kernel would run each attention of a model, and why; and what is not redirected.

    MODEL is a name of timm, or a kind of model of transformers. It is made with random weights, nothing is fetched; its
    attention is redirected to attn, and one forward is run and recorded.

    \b
    Examples:
        attn report vit_base_patch16_224
        attn report bert --seqlen 512 --dtype bfloat16
        attn report llama --set num_hidden_layers=2 --grad --json
    """
    wanted = Wanted(
        name=model,
        batch=batch,
        size=size,
        seqlen=seqlen,
        dtype=getattr(torch, dtype),
        device=_device(device),
        settings=dict(settings),
    )
    with ExitStack() as scopes:
        if preferred:
            scopes.enter_context(prefer(*preferred))
        if allowed:
            scopes.enter_context(allow(*allowed))
        found = _found(wanted, with_torch=with_torch, grad=grad, quiet=as_json)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _found(wanted: Wanted, *, with_torch: bool, grad: bool, quiet: bool) -> dict[str, Any]:
    """The report, as plain data."""
    from rich.console import Console

    shown = Console(stderr=True, quiet=quiet, markup=False)
    with shown.status(f"looking for {wanted.name}") as status:
        library = library_of(wanted.name)
        with _enabled(library, *(("torch",) if with_torch else ())):
            status.update(f"building {wanted.name} of {library}, with random weights")
            model = build(library, wanted)
            inputs = inputs_of(library, model, wanted)
            status.update(f"running {wanted.name} on {_shapes(inputs)}")
            with record(model) as calls:
                _run(model, inputs, grad=grad)
            told = getattr(HOSTS[library].integration, "report", None)
            modules = [] if told is None else told(model).to_dict()
        status.update("weighing the other kernels")
        problems = {row.problem: explain_problem(row.problem) for row in calls if row.problem is not None}
    return {
        "model": wanted.name.removeprefix(f"{library}:"),
        "library": library,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "device": str(wanted.device),
        "calls": _calls(calls, problems),
        "problems": [explained.to_dict() for explained in problems.values()],
        "not_redirected": [row for row in modules if not row["redirected"]],
        "redirected": [row for row in modules if row["redirected"]],
    }


@contextmanager
def _enabled(*hosts: str) -> Iterator[None]:
    """These integrations enabled, and those that were not disabled again."""
    ours = []
    try:
        for name in hosts:
            host = HOSTS[name]
            check_version(host)
            if not host.enabled:
                host.integration.enable()
                ours.append(host)
        yield
    finally:
        for host in reversed(ours):
            host.integration.disable()


def _run(model: nn.Module, inputs: dict[str, Tensor], *, grad: bool) -> None:
    """One forward. Raises InputError where the model fails, unless attn says why."""
    try:
        with torch.set_grad_enabled(grad):
            model(**inputs)
    except AttnError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            f"{type(model).__name__} fails on {_shapes(inputs)}: {type(error).__name__}: {lines[0] if lines else ''}"
        ) from error


def _calls(calls: Recorder, problems: dict[Problem, Explanation]) -> list[dict[str, Any]]:
    """The rows, those of modules that do the same joined."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(calls, key=_in_order):
        key = row.kernel, row.problem, row.reason
        if key not in joined:
            next_best = None if row.problem is None else _next_best(problems[row.problem])
            joined[key] = {
                "modules": [],
                "kernel": row.kernel,
                "calls": 0,
                "problem": None if row.problem is None else str(row.problem),
                "adaptations": list(row.adaptations),
                "reason": row.reason,
                "next_best": next_best,
            }
        joined[key]["modules"].append(row.module)
        joined[key]["calls"] += row.calls or 0
    return list(joined.values())


def _in_order(row: Row) -> list[Any]:
    """Modules as a reader counts them: blocks.2 before blocks.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in row.module.split(".")]


def _next_best(explained: Explanation) -> dict[str, Any] | None:
    """The kernel that would come next, and by how much it is slower, as estimated; where none is left, a refusal."""
    chosen, *others = explained.verdicts
    following: Verdict | None = next((verdict for verdict in others if verdict.seconds is not None), None)
    if following is None:
        following = next((verdict for verdict in others if verdict.state == "refused"), None)
    if following is None:
        return None
    times = None
    if following.seconds is not None and chosen.seconds:
        times = following.seconds / chosen.seconds
    return {"kernel": following.kernel, "times": times, "reasons": list(following.reasons)}


def _show(found: dict[str, Any]) -> None:
    out = console()
    inputs = ", ".join(f"{name} {shape}" for name, shape in found["inputs"].items())
    out.print(
        f"{found['model']} ({found['library']}), {found['parameters'] / 1e6:.1f} million parameters, random weights;"
        f" {inputs}, {found['dtype']}, {found['device']}"
    )
    if found["calls"]:
        what = table("what ran", "modules", "kernel", "calls", "problem", "why", "next best")
        for call in found["calls"]:
            after = f"after {', '.join(call['adaptations'])}" if call["adaptations"] else ""
            why = call["reason"] or after
            what.add_row(
                _some(call["modules"]), call["kernel"], str(call["calls"]), call["problem"] or "", why, _told(call)
            )
        out.print(what)
    else:
        out.print("no attention went through attn")
    refusals = _refusals(found["problems"])
    if refusals:
        others = table("why not the others", "kernel", "problems", "why")
        for kernel, why, count in refusals:
            others.add_row(kernel, str(count), why)
        out.print(others)
    _show_left_alone(out, found["not_redirected"])


def _show_left_alone(out: Any, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    joined: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        joined.setdefault((row["kind"], row["reason"]), []).append(row["module"])
    left = table("not redirected", "modules", "kind", "why")
    for (kind, reason), names in joined.items():
        left.add_row(_some(names), kind, reason)
    out.print(left)


def _refusals(problems: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(kernel, why it does not take a problem, how many such problems); the first stands for all of the same fields."""
    found: dict[tuple[Any, ...], tuple[str, str, int]] = {}
    for explained in problems:
        for verdict in explained["verdicts"]:
            if verdict["state"] not in ("chosen", "ready"):
                why = "\n".join(verdict["reasons"]) or verdict["state"]
                key = verdict["kernel"], *(verdict["refused_fields"] or [why])
                kernel, first, count = found.get(key, (verdict["kernel"], why, 0))
                found[key] = kernel, first, count + 1
    return sorted(found.values())


def _told(call: dict[str, Any]) -> str:
    following = call["next_best"]
    if following is None:
        return ""
    if following["times"] is not None:
        return f"{following['kernel']}, {following['times']:.2g} times the seconds, as estimated"
    return f"none; {following['kernel']}: {'; '.join(following['reasons'])}"


def _some(names: list[str]) -> str:
    names = [name or "(the model)" for name in names]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {names[-1]} ({len(names)} modules)"


def _shapes(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise click.BadParameter(f"{name!r} cannot be used here: {line}", param_hint="--device") from error
    return device
