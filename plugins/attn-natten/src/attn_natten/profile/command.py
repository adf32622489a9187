"""`attn profile-na`: times neighborhood attention by each kernel and configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from attn_core.cli.console import console, table
from attn_core.errors import AttnError, InputError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..autotuner.families import UNTUNABLE, Family, family_of
from .case import Case
from .flags import DTYPE, PerAxis, Spread, case_of, dtype_flag, kernels_of
from .measure import Times, measure
from .optimize import TAKES, Candidate, candidates, explained, optimize
from .result import Result, Trial, load

ONE = (1,)


@click.command(cls=Spread)
@click.option("-i", "--input-size", type=PerAxis(), metavar="N [N [N]]", help="Tokens on each of 1 to 3 axes.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("-n", "--heads", type=click.IntRange(1), default=1, show_default=True, help="Of queries.")
@click.option("--heads-kv", type=int, help="Of keys and values; default: as many as of queries.")
@click.option("-d", "--dim", type=click.IntRange(1), default=64, show_default=True, help="Of a head.")
@click.option("--dim-value", type=click.IntRange(1), help="Of a head of values; default: the same.")
@click.option(
    "-w",
    "--window-size",
    type=PerAxis(),
    metavar="N [N [N]]",
    help="kernel_size; default: all tokens (self attention).",
)
@click.option(
    "-s", "--stride", type=PerAxis(), default=ONE, metavar="N [N [N]]", help="Queries that share a window; default: 1."
)
@click.option("--dilation", type=PerAxis(), default=ONE, metavar="N [N [N]]", help="Distance of keys; default: 1.")
@click.option(
    "-c",
    "--causal",
    type=PerAxis(bool),
    default=(False,),
    metavar="BOOL [BOOL [BOOL]]",
    help="is_causal; default: False.",
)
@click.option(
    "--dtype", type=DTYPE, metavar="NAME", callback=dtype_flag, default="float32", show_default=True, help="Or fp16, …"
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …; --dry-run takes absent ones.")
@click.option("--backprop", is_flag=True, help="The backward pass as well.")
@click.option(
    "--add-kv", type=click.IntRange(0), default=0, show_default=True, help="Additional keys that every query sees."
)
@click.option("--kernel", multiple=True, metavar="NAME", help="Insist on this one, such as torch/tiled; repeatable.")
@click.option("--backend", metavar="NAME", help="NATTEN's name of one of its kernels, such as cutlass-fna.")
@click.option("--q-tile", type=PerAxis(), metavar="N [N [N]]", help="Queries of a tile, forward; see --dry-run.")
@click.option("--kv-tile", type=PerAxis(), metavar="N [N [N]]", help="Keys of a tile, forward; NATTEN's kernels.")
@click.option("--backward-q-tile", type=PerAxis(), metavar="N [N [N]]", help="Queries of a tile, backward.")
@click.option("--backward-kv-tile", type=PerAxis(), metavar="N [N [N]]", help="Keys of a tile, backward.")
@click.option("--schedule", type=click.Choice(["non", "coop", "pp"]), help="Of natten/hopper-fna.")
@click.option("--warmup-steps", type=click.IntRange(0), default=10, show_default=True, help="Runs that do not count.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Runs that do.")
@click.option("--dry-run", is_flag=True, help="Run nothing: list kernels and configurations, and why not the others.")
@click.option(
    "--max-configs",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Configurations of a kernel that --dry-run shows; 0: all.",
)
@click.option("--optimize", "search", is_flag=True, help="Time every kernel and configuration, and save the best.")
@click.option("--thorough", is_flag=True, help="All configurations, not just the likely ones.")
@click.option("--optimize-warmup-steps", type=click.IntRange(0), default=5, show_default=True)
@click.option("--optimize-steps", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("profile-na.json"),
    show_default=True,
    help="Where --optimize saves its result.",
)
@click.option(
    "--load",
    "loaded",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A saved result: profiles its problem in its best configuration.",
)
@click.pass_context
def profile_na(ctx: click.Context, /, **flags: Any) -> None:
    """Time neighborhood attention: by the kernel that attn picks, by one of your choice, or by all of them.

    Without further flags it runs the call and prints medians. --dry-run lists what could run. --optimize times every
    kernel that takes the problem, in each of its configurations, and saves the best, which --load runs again and
    Python takes:

    \b
        best = attn_natten.profile.load("profile-na.json")
        with best.applied():
            out = attn_natten.na2d(query, key, value, kernel_size=7)

    Sizes have one value for each axis, or one for all: -w 7 7, -w 7,7 or -w 7.

    \b
    Examples:
        attn profile-na -i 56 56 -w 7 7 -n 4 -d 32
        attn profile-na -i 56 56 -w 7 -n 4 -d 32 --backprop --kernel torch/tiled --q-tile 4 8
        attn profile-na -i 16 32 32 -w 3 7 7 -n 4 -d 32 --dry-run
        attn profile-na -i 56 56 -w 7 -n 4 -d 32 --backprop --optimize --out best.json
        attn profile-na --load best.json
    """
    try:
        _profile(ctx, **flags)
    except AttnError as error:
        raise click.UsageError(str(error)) from error


def _profile(
    ctx: click.Context,
    *,
    kernel: tuple[str, ...],
    backend: str | None,
    q_tile: tuple[int, ...] | None,
    kv_tile: tuple[int, ...] | None,
    backward_q_tile: tuple[int, ...] | None,
    backward_kv_tile: tuple[int, ...] | None,
    schedule: str | None,
    warmup_steps: int,
    steps: int,
    dry_run: bool,
    max_configs: int,
    search: bool,
    thorough: bool,
    optimize_warmup_steps: int,
    optimize_steps: int,
    out: Path,
    loaded: Path | None,
    **problem: Any,
) -> None:
    modes = [flag for flag, on in (("--dry-run", dry_run), ("--optimize", search), ("--load", loaded)) if on]
    if len(modes) > 1:
        raise click.UsageError(f"{' and '.join(modes)}: one at a time")
    if loaded is not None:
        saved = load(loaded)
        family = family_of(saved.kernel, saved.case.problem()) or UNTUNABLE
        _print_times(
            saved.case, measured(saved.case, saved.kernel, family, saved.forward, saved.backward, warmup_steps, steps)
        )
        return
    if problem["input_size"] is None:
        raise click.UsageError("--input-size: missing; such as -i 56 56")
    case = case_of(**problem)
    kernels = kernels_of(kernel, backend)
    tiles = {
        "--q-tile": q_tile,
        "--kv-tile": kv_tile,
        "--backward-q-tile": backward_q_tile,
        "--backward-kv-tile": backward_kv_tile,
        "--schedule": schedule,
    }
    given = {flag: value for flag, value in tiles.items() if value is not None}
    if dry_run:
        _refuse_tiles(given, "--dry-run lists them")
        _print_dry_run(case, kernels, thorough, max_configs)
        return
    _check_device(case)
    if search:
        _refuse_tiles(given, "--optimize finds them")
        _search(case, kernels, thorough, optimize_warmup_steps, optimize_steps, out)
        return
    if len(kernels) > 1:
        raise click.UsageError(f"--kernel: takes one without --dry-run or --optimize, got {', '.join(kernels)}")
    name = kernels[0] if kernels else None
    explanation = explained(case, name)
    explanation.raise_if_refused()
    chosen = explanation.chosen
    assert chosen is not None  # said above
    family = family_of(chosen, case.problem()) or UNTUNABLE
    forward, backward = _of_flags(chosen, family, case, given)
    _print_times(
        case, measured(case, name or (chosen if given else None), family, forward, backward, warmup_steps, steps)
    )


def _refuse_tiles(given: dict[str, Any], why: str) -> None:
    if given:
        raise click.UsageError(f"{', '.join(given)}: not here, {why}")


def _check_device(case: Case) -> None:
    """Raises a click error where the device is not there."""
    try:
        torch.empty(1, device=case.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {case.device}: is not there ({reason}); --dry-run needs none") from error


def _of_flags(kernel: str, family: Family, case: Case, given: dict[str, Any]) -> tuple[Any, Any]:
    """(forward, backward) configurations that the flags say; None is the kernel's own."""
    found: list[Any] = []
    rank = case.rank
    for direction, prefix in (("forward", "--"), ("backward", "--backward-")):
        flags = {flag: given[flag] for flag in (f"{prefix}q-tile", f"{prefix}kv-tile") if flag in given}
        if direction == "forward" and "--schedule" in given:
            flags["--schedule"] = given["--schedule"]
        for flag, value in flags.items():
            if isinstance(value, tuple) and len(value) != rank:
                shown = " ".join(map(str, value))
                raise click.UsageError(f"{flag} {shown}: takes {rank} values, one for each axis of --input-size")
        words = {flag.removeprefix(prefix).replace("-", "_"): value for flag, value in flags.items()}
        if not words:
            found.append(None)
            continue
        if direction == "backward" and not case.backward:
            raise click.UsageError(f"{', '.join(flags)}: needs --backprop")
        try:
            found.append(family.from_words(words))
        except InputError as error:
            raise click.UsageError(f"{', '.join(flags)}: {kernel}: {error}") from error
    return found[0], found[1]


# Running


@contextmanager
def bar(total: int) -> Iterator[tuple[Progress, Any]]:
    """A progress bar on standard error, gone when it is over; nothing where no terminal shows it."""
    shown = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        yield progress, progress.add_task("starting", total=total)


def measured(
    case: Case, kernel: str | None, family: Family, forward: Any, backward: Any, warmup_steps: int, steps: int
) -> list[Times]:
    with bar((warmup_steps + steps) * (2 if case.backward else 1)) as (progress, task):
        progress.update(task, description=kernel or "the best kernel")
        return measure(
            case,
            kernel,
            family,
            forward,
            backward,
            warmup_steps=warmup_steps,
            steps=steps,
            tell=lambda: progress.advance(task),
        )


def _search(case: Case, kernels: tuple[str, ...], thorough: bool, warmup_steps: int, steps: int, out: Path) -> None:
    if not out.parent.is_dir():
        raise click.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    left_out = [] if kernels else [each for each in candidates(case, explained(case)) if each.hopeless]
    with bar(1) as (progress, task):

        def begin(trials: int) -> None:
            progress.update(task, total=trials)

        def tell(trial: Trial) -> None:
            progress.update(task, advance=1, description=f"{trial.kernel} {trial.direction}")

        result = optimize(
            case, kernels=kernels, thorough=thorough, warmup_steps=warmup_steps, steps=steps, begin=begin, tell=tell
        )
    result.save(out)
    _print_result(result, left_out)
    click.echo(f"Saved in {out}; attn profile-na --load {out} runs it.")


# Printing


def _print_times(case: Case, found: list[Times]) -> None:
    shown = table(str(case), "pass", "by", "median ms", "fastest ms", "slowest ms", "GFLOP/s")
    for times in found:
        shown.add_row(
            times.direction,
            ", ".join(times.kernels),
            *(f"{1e3 * value:.3g}" for value in (times.median, min(times.seconds), max(times.seconds))),
            f"{times.flops / times.median / 1e9:.3g}",
        )
    console().print(shown)


def _print_dry_run(case: Case, kernels: tuple[str, ...], thorough: bool, max_configs: int) -> None:
    explanations = [explained(case, name) for name in kernels] or [explained(case)]
    shown = table(str(case), "kernel", "state", "estimated ms", "configurations, or why not")
    usable = 0
    for explanation in explanations:
        found = {each.kernel: each for each in candidates(case, explanation, thorough=thorough)}
        for verdict in explanation:
            if verdict.state in TAKES:
                usable += 1
                candidate = found[verdict.kernel]
                text = "\n".join(_listed(candidate, max_configs))
            else:
                fix = [f"to type: {verdict.fix}"] if verdict.fix else []
                text = "\n".join([*verdict.reasons, *fix])
            estimate = "" if verdict.seconds is None else f"{1e3 * verdict.seconds:.3g}"
            shown.add_row(verdict.kernel, verdict.state, estimate, text)
    console().print(shown)
    if not usable:
        raise click.ClickException(f"no kernel takes {case}")


def _listed(candidate: Candidate, most: int) -> Iterator[str]:
    for direction, configurations in (("forward", candidate.forward), ("backward", candidate.backward)):
        if configurations == (None,):
            yield f"{direction}: its own"
        elif configurations:
            few = configurations if most == 0 else configurations[:most]
            more = len(configurations) - len(few)
            names = [_configured(candidate.family, each) for each in few] + ([f"… {more} more"] if more else [])
            yield f"{direction}, {len(configurations)}: {'; '.join(names)}"


def _configured(family: Family, configuration: Any) -> str:
    """A configuration in words."""
    written = family.written(configuration)
    if not written:
        return "its own"
    return ", ".join(
        f"{name} {'x'.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"
        for name, value in written.items()
    )


def _print_result(result: Result, left_out: list[Candidate]) -> None:
    problem = result.case.problem()
    shown = table(str(result.case), "kernel", "pass", "trials", "own ms", "best ms", "best configuration")
    for kernel in dict.fromkeys(trial.kernel for trial in result.trials):
        family = family_of(kernel, problem) or UNTUNABLE
        for direction in ("forward", "backward"):
            trials = [t for t in result.trials if (t.kernel, t.direction) == (kernel, direction)]
            if not trials:
                continue
            best = min(trials, key=lambda trial: trial.seconds)
            ran = [_milliseconds(trials[0].seconds), _milliseconds(best.seconds)]
            how = "" if math.isinf(best.seconds) else _configured(family, best.configuration)
            style = "bold green" if kernel == result.kernel else None
            shown.add_row(kernel, direction, f"{len(trials)}", *ran, how, style=style)
    console().print(shown)
    for candidate in left_out:
        click.echo(
            f"{candidate.kernel}: left out, its estimate is far beyond the best; --kernel {candidate.kernel} times it"
        )
    click.echo(f"Best: {result.kernel}")


def _milliseconds(seconds: float) -> str:
    return "could not run" if math.isinf(seconds) else f"{1e3 * seconds:.3g}"
