"""Prints which check of the conformance kit catches which wrong kernel of `saboteurs.py`; ends with 1 where one is not.

    nox -s saboteurs [-- NAME...]

Runs every check on every saboteur, not only the one that is meant for it: many are caught more than once. A check is
run until its first problem that fails. Saboteurs that take their process with them are checked in one of their own.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from attn_core.conformance import CHECKS
from attn_core.conformance.isolated import check_isolated
from saboteurs import DEADLY, SABOTEURS, Saboteur, deadly_plugin

#: Seconds for one problem of a kernel that never ends, and of others.
LIMIT_OF_HANGS, LIMIT = 10.0, 120.0


def main(names: Iterable[str], chosen_from: Mapping[str, Saboteur], say: Callable[[str], None]) -> int:
    """Says a line per saboteur; 1 where one was not caught by the check meant for it, 2 for an unknown name."""
    names = list(names) or [*chosen_from, *DEADLY]
    unknown = [name for name in names if name not in chosen_from and name not in DEADLY]
    if unknown:
        say(f"no saboteur is named {', '.join(map(repr, unknown))}; there are: {', '.join([*chosen_from, *DEADLY])}")
        return 2
    width = max(map(len, names))
    missed = []
    for name in names:
        if name in DEADLY:
            how = _end_of(name)
            say(f"{name:{width}}  {how or 'NOT caught'}")
            missed += [] if how else [name]
        elif not _line(name, chosen_from[name], width, say):
            missed.append(name)
    say(f"{len(names) - len(missed)} of {len(names)} caught by the check for them")
    if missed:
        say(f"NOT caught: {', '.join(missed)}")
    return 1 if missed else 0


def _end_of(name: str) -> str:
    """How the process of a kernel ended that takes it along; empty where it did not."""
    with tempfile.TemporaryDirectory() as folder, deadly_plugin(Path(folder)):
        limit = LIMIT_OF_HANGS if name == "hangs" else LIMIT
        first = next(check_isolated(f"deadly/{name}", only="agrees", limit=limit))
    return "" if first else f"{first.check}: {first.reason}"


def _line(name: str, saboteur: Saboteur, width: int, say: Callable[[str], None]) -> bool:
    """Says who caught it, the check that is meant for it first."""
    found = [check for check in CHECKS if not all(saboteur.finds(check))]
    caught = saboteur.caught_by in found
    others = [check for check in found if check != saboteur.caught_by]
    say(f"{name:{width}}  {', '.join([saboteur.caught_by if caught else f'NOT by {saboteur.caught_by}', *others])}")
    return caught


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:], SABOTEURS, lambda line: print(line, flush=True)))  # noqa: T201
