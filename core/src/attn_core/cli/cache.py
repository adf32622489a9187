"""`attn cache`: what attn itself wrote on this machine, and removing it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from ..environment import path_of_costs, read_environment
from ..errors import InputError
from ..registry import registry
from ..usage import is_file_of_counts
from .console import console, print_json, table

COSTS, COUNTS, LEFT_OVER = "measured costs", "counts of calls", "left over"
#: What tempfile puts into the name of a file that is not whole yet.
RANDOM = "[a-z0-9_]{8}"


@dataclass(frozen=True, kw_only=True)
class Written:
    """One file; `ours` False: it lies where attn would write, and is none that attn wrote, so it stays."""

    file: str
    kind: str
    bytes: int
    ours: bool = True


@click.command()
@click.argument("action", metavar="[show|clear]", type=click.Choice(["show", "clear"]), default="show")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--json", "as_json", is_flag=True, help="The list, for programs.")
def cache(action: str, yes: bool, as_json: bool) -> None:
    """List what attn wrote on this machine, with sizes, and remove it.

    These are the measured costs of `attn calibrate` and the counts of ATTN_USAGE, where the ATTN_* variables say or in
    the user's cache, and what an interrupted write left of them. Nothing else is removed: not what was written where
    you said (certificates, pictures, projects), and not torch's caches of compiled kernels.

    \b
    Examples:
        attn cache
        attn cache clear --yes
    """
    found = written()
    if action == "show":
        _show(found, as_json)
        return
    ours = [each for each in found if each.ours]
    if not as_json:
        _show(found, as_json)
    if ours and not yes:
        click.confirm(f"Remove {'this file' if len(ours) == 1 else f'these {len(ours)} files'}?", abort=True, err=True)
    for each in ours:
        _remove(Path(each.file))
    _remove_empty_folder()
    if registry.calibration is not None:
        registry.use_costs(None)
    if as_json:
        print_json([asdict(each) for each in ours])
    else:
        console().print(f"removed {len(ours)} {'file' if len(ours) == 1 else 'files'}")


def written() -> list[Written]:
    """The files, by kind."""
    environment = read_environment()
    costs = path_of_costs(environment)
    found: list[Written] = []
    if costs is not None:
        found += _kept(costs, COSTS, is_file_of_costs)
        found += _left_over(costs, rf"\.{re.escape(costs.name)}\.{RANDOM}")
    if environment.usage is not None:
        counts = Path(environment.usage)
        found += _kept(counts, COUNTS, is_file_of_counts)
        found += _left_over(counts, rf"{re.escape(counts.name)}({RANDOM}\.tmp|\.lock)")
    return found


def is_file_of_costs(path: Path) -> bool:
    """Whether `attn calibrate` wrote it, for whatever machine and version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"format", "torch", "devices"} <= set(data)


def _kept(path: Path, kind: str, ours: Callable[[Path], bool]) -> list[Written]:
    if not path.is_file():
        return []
    return [Written(file=str(path), kind=kind, bytes=path.stat().st_size, ours=ours(path))]


def _left_over(beside: Path, pattern: str) -> list[Written]:
    """Of a write that was interrupted, or the lock of one."""
    if not beside.parent.is_dir():
        return []
    found = sorted(path for path in beside.parent.iterdir() if re.fullmatch(pattern, path.name) and path.is_file())
    return [Written(file=str(path), kind=LEFT_OVER, bytes=path.stat().st_size) for path in found]


def _show(found: list[Written], as_json: bool) -> None:
    if as_json:
        print_json([asdict(each) for each in found])
        return
    if not found:
        console().print("attn has written nothing on this machine.")
        return
    shown = table("written by attn", "file", "what", "bytes")
    for each in found:
        kind = each.kind if each.ours else f"not by attn, although {each.kind} would lie there: it stays"
        shown.add_row(each.file, kind, f"{each.bytes:,}")
    console().print(shown)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error}") from error


def _remove_empty_folder() -> None:
    """The folder that attn made for itself in the user's cache; not one that was named by a variable."""
    environment = read_environment()
    costs = path_of_costs(environment)
    if costs is None or environment.costs is not None:
        return
    with contextlib.suppress(OSError):  # not there, or somebody keeps something in it
        costs.parent.rmdir()
