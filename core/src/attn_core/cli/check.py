"""`attn check`: holds kernels to what they declare, each in a process of its own, and writes certificates."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..errors import InputError, UnknownKernelError, suggestion
from ..kernel import Kernel
from ..registry import registry
from .console import console, table


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "every", is_flag=True, help="Every kernel that is ready on this machine.")
@click.option("--device", default="cpu", show_default=True, help="Device type to check on.")
@click.option("--only", metavar="CHECK", help="This check alone; no certificate is written.")
@click.option(
    "--limit", default=120.0, show_default=True, metavar="SECONDS", help="What one check of one case may take."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write certificates, a JSON file and a Markdown table each, into this folder.",
)
@click.option(
    "--read",
    "files",
    multiple=True,
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Run nothing; say whether this certificate holds for what is installed here. Repeatable.",
)
def check(
    names: tuple[str, ...],
    every: bool,
    device: str,
    only: str | None,
    limit: float,
    out: Path | None,
    files: tuple[Path, ...],
) -> None:
    """Prove that kernels do what they declare.

    NAME is a kernel, a plugin, or a shell pattern. The problems are derived from the kernel's own declaration: each
    result is held against a float64 reference, and everything that is not declared must be refused. A kernel that
    crashes, hangs or ends the process costs one row. Ends with 1 where something failed, or nothing could be checked.

    \b
    Examples:
        attn check hello
        attn check torch/flash --out certificates
        attn check "torch/*" --only agrees
        attn check --all
        attn check --read certificates/hello-sdpa.cpu.json
    """
    from ..conformance.certificate import certificate, write
    from ..conformance.checks import must_be_known
    from ..conformance.isolated import LONGEST, check_isolated
    from ..conformance.results import NotTestable
    from ..conformance.subject import Subject, must_be_here

    if files:
        if names or every or only or out:
            raise click.UsageError("--read runs nothing: give no kernels, --all, --only or --out beside it")
        sys.exit(_read(files))
    if not 0 < limit <= LONGEST:
        raise click.UsageError(f"--limit: seconds are above 0, and {LONGEST:,.0f} at most, got {limit:g}")
    kernels = _chosen(names, every)
    if not kernels:
        raise click.UsageError("there are no kernels: `attn plugins` says why")
    try:
        must_be_known(only)
        must_be_here(device)
    except InputError as said:
        raise click.UsageError(f"--{said}") from said
    if out is not None:
        _must_be_writable(out)
    failed, checked = False, 0
    shown = table("kernels checked", "kernel", "passed", "failed", "skipped", "largest error", "seconds")
    for kernel in kernels:
        condition = registry.condition(kernel)
        if condition.state not in ("ready", "failed"):
            shown.add_row(kernel.name, "", "", condition.state, condition.reason, "", style="dim")
            continue
        try:
            Subject(kernel, device).declared  # noqa: B018  (asked for its error)
        except NotTestable as said:
            shown.add_row(kernel.name, "", "", "not here", str(said), "", style="dim")
            continue
        checked += 1
        results, started = [], time.perf_counter()
        with _progress(kernel.name) as (progress, task):
            for result in check_isolated(kernel.name, device=device, only=only, limit=limit):
                results.append(result)
                progress.update(task, advance=1, description=f"{kernel.name} {result.check}")
                if not result:
                    progress.console.print(f"failed: {result.kernel} {result.name}: {result.reason}", style="red")
                    if result.problem:
                        progress.console.print(f"  the problem: {result.problem}")
        made = certificate(kernel, device, results)
        count = Counter(result.status for result in results)
        failed = failed or not made.granted
        error = "" if made.error is None else f"{made.error:.2f} of the budget"
        spent = f"{time.perf_counter() - started:.0f}"
        numbers = (str(count["passed"]), str(count["failed"]), str(count["skipped"]))
        shown.add_row(kernel.name, *numbers, error, spent, style=None if made.granted else "red")
        if out is not None and only is None:
            try:
                for path in write(made, out):
                    console().print(f"wrote {path}")
            except OSError as full:  # the folder was writable before; what is checked next may do no better, or may
                failed = True
                console().print(f"cannot write the certificate of {kernel.name}: {full}", style="red")
    console().print(shown)
    if not checked:
        console().print("nothing was checked", style="red")
    sys.exit(1 if failed or not checked else 0)


def _read(files: tuple[Path, ...]) -> int:
    """Says of each certificate whether it holds here; 1 where one does not."""
    from ..conformance.certificate import read, strangeness

    code = 0
    for file in files:
        try:
            certificate = read(file)
        except (ValueError, OSError) as error:
            raise click.UsageError(f"--read: {error}") from error
        other = strangeness(certificate)
        said = "holds what it declares" if certificate.granted else f"FAILED {len(certificate.failures)} rows"
        console().print(f"{certificate.kernel} on {certificate.device}, {certificate.when[:10]}: {said}")
        if other:
            console().print("  it was made elsewhere, and says nothing of what is installed here:")
            for line in other:
                console().print(f"    {line}")
        code = max(code, 1 if other or not certificate.granted else 0)
    return code


def _chosen(names: tuple[str, ...], every: bool) -> list[Kernel]:
    """The kernels that are named. Raises UnknownKernelError for a name that fits nothing."""
    kernels = registry.kernels()
    if every:
        if names:
            raise click.UsageError("give names or --all, not both")
        return list(kernels)
    if not names:
        raise click.UsageError("which kernel? Give a name, a plugin or a pattern, or --all; `attn kernels` lists them")
    found: list[Kernel] = []
    for name in names:
        fitting = [kernel for kernel in kernels if kernel.plugin == name or fnmatchcase(kernel.name, name)]
        if not fitting:
            plugin = next((plugin for plugin in registry.plugins() if plugin.name == name), None)
            if plugin is not None:
                reason = f"is {plugin.state}: {plugin.reason}" if plugin.state != "ready" else "yields no kernels"
                raise UnknownKernelError(f"plugin {name!r} {reason}")
            known = [kernel.name for kernel in kernels] + [plugin.name for plugin in registry.plugins()]
            raise UnknownKernelError(f"no kernel or plugin {name!r}.{suggestion(name, known)} `attn kernels` lists all")
        found += [kernel for kernel in fitting if kernel not in found]
    return found


def _must_be_writable(folder: Path) -> None:
    """Before minutes of checks: where the certificates cannot be written, say so now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".attn-check"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise click.UsageError(f"--out: cannot write into {folder}: {error.strerror}") from error


@contextmanager
def _progress(name: str) -> Iterator[tuple[Progress, TaskID]]:
    """A line that tells which check runs; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        yield progress, progress.add_task(name, total=None)
