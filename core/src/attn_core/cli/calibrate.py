"""`attn calibrate`: fits the constants of the estimates to this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from ..cost import Cost
from ..costs_file import Calibration, UnusableFileError, as_data, device_name, read_costs, write_costs
from ..environment import path_of_costs, read_environment
from ..errors import InputError
from ..registry import registry
from .console import console, print_json, table

if TYPE_CHECKING:
    from ..calibration import Fit
    from ..rates import Rates


@click.command()
@click.option("--kernels", "pattern", metavar="PATTERN", default="*", show_default=True, help="Only these.")
@click.option("--dry-run", is_flag=True, help="Measure and show; keep nothing.")
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write there instead.")
@click.option("--forget", is_flag=True, help="Remove what was measured; estimates are by the shipped constants again.")
@click.option("--json", "as_json", is_flag=True, help="What is written, for programs.")
def calibrate(pattern: str, dry_run: bool, out: Path | None, forget: bool, as_json: bool) -> None:
    """Fit the estimates to this machine: one or two minutes, best while nothing else runs.

    Which kernel runs a call is decided by estimated seconds, whose constants come from one machine. This measures every
    kernel that can run here on some thirty small problems, forward and backward, and keeps constants that fit them;
    the first choice of each process reads them. They are for this CPU, this torch and this number of threads; with
    another number the estimates are scaled.

    \b
    Examples:
        attn calibrate
        attn calibrate --kernels "torch/*" --dry-run
        attn calibrate --forget
    """
    path = out or path_of_costs(read_environment())
    if path is None and not dry_run:
        raise InputError("ATTN_COSTS is set, but empty: no file of costs is read or written; unset it or give --out")
    if forget:
        assert path is not None
        _forget(path)
        return
    found, seconds = _measured(pattern, quiet=as_json)
    from ..calibration import gathered

    calibration = gathered(found)
    if pattern != "*" and path is not None:  # what was not measured now is kept
        calibration = calibration.joined(_older(path))
    if not dry_run:
        assert path is not None
        try:
            write_costs(path, calibration)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error}") from error
    if as_json:
        print_json(as_data(calibration))
        return
    shown = console()
    shown.print(_constants(found))
    shown.print(_errors(found))
    threads = torch.get_num_threads()
    shown.print(f"measured on {device_name()}, with {threads} thread{'s' if threads != 1 else ''}, in {seconds:.0f} s")
    shown.print("nothing was written" if dry_run else f"written to {path}")


def _forget(path: Path) -> None:
    try:
        path.unlink()
        console().print(f"removed {path}")
    except FileNotFoundError:
        console().print(f"there is no {path}")
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error}") from error
    if registry.calibration is not None:
        registry.use_costs(None)


def _older(path: Path) -> Calibration | None:
    """What the file holds for this machine; nothing where it is of another."""
    try:
        return read_costs(path)
    except UnusableFileError:
        return None


def _measured(pattern: str, *, quiet: bool) -> tuple[list[Fit | Rates], float]:
    """What was measured, and in how many seconds; a line of progress meanwhile."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ..calibration import calibrate as measure

    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True, quiet=quiet)) as progress:
        task = progress.add_task("measuring", total=1.0)
        found = measure(pattern, tell=lambda share: progress.update(task, completed=share))
        progress.update(task, description="measured", completed=1.0)
    return found, time.perf_counter() - start


def _constants(found: list[Fit | Rates]) -> Any:
    from ..calibration import CONSTANTS, Fit

    shown = table("constants, in seconds: shipped or measured before -> now", "kernel", "", *CONSTANTS)
    for each in found:
        if isinstance(each, Fit):
            shown.add_row(each.kernel, "forward", *_changes(each.before, each.after))
            if each.after.with_backward is not None:
                shown.add_row("", "both", *_changes(each.before.with_backward, each.after.with_backward))
    return shown


def _changes(before: Cost | None, after: Cost) -> list[str]:
    from ..calibration import CONSTANTS

    def value(cost: Cost | None, name: str) -> str:
        return "·" if cost is None or not getattr(cost, name) else f"{getattr(cost, name):.2g}"

    return [f"{value(before, name)} -> {value(after, name)}" for name in CONSTANTS]


def _errors(found: list[Fit | Rates]) -> Any:
    from ..calibration import Fit

    shown = table("how far estimates are off", "kernel", "problems", "half of them", "", "nine tenths", "")
    for each in found:
        if isinstance(each, Fit):
            cells = [f"{100 * off:.0f} %" for pair in zip(each.error_before, each.error_after) for off in pair]
            half_before, half_after, most_before, most_after = cells
            shown.add_row(
                each.kernel, str(each.problems), half_before, f"-> {half_after}", most_before, f"-> {most_after}"
            )
    return shown
