"""Prints which check of the conformance kit catches which wrong kernel of `saboteurs.py`; ends with 1 where one is not.

    nox -s saboteurs [-- NAME...]

Runs every check on every saboteur, not only the one that is meant for it: many are caught more than once.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from attn_core.conformance import check_kernel
from saboteurs import SABOTEURS, Saboteur


def main(names: Iterable[str], chosen_from: Mapping[str, Saboteur], say: Callable[[str], None]) -> int:
    """Says a line per saboteur; 1 where one was not caught by the check meant for it, 2 for an unknown name."""
    names = list(names) or list(chosen_from)
    unknown = [name for name in names if name not in chosen_from]
    if unknown:
        say(f"no saboteur is named {', '.join(map(repr, unknown))}; there are: {', '.join(chosen_from)}")
        return 2
    width = max(map(len, names))
    missed = [name for name in names if not _line(name, chosen_from[name], width, say)]
    say(f"{len(names) - len(missed)} of {len(names)} caught by the check for them")
    if missed:
        say(f"NOT caught: {', '.join(missed)}")
    return 1 if missed else 0


def _line(name: str, saboteur: Saboteur, width: int, say: Callable[[str], None]) -> bool:
    """Says who caught it, the check that is meant for it first, each with the number of its problems that failed."""
    failed = Counter(result.check for result in check_kernel(saboteur.kernel) if not result)
    rest = sorted(check for check in failed if check != saboteur.caught_by)
    found = [f"{check} {failed[check]}" for check in (saboteur.caught_by, *rest) if failed[check]]
    caught = failed[saboteur.caught_by] > 0
    say(f"{name:{width}}  {'' if caught else f'NOT by {saboteur.caught_by}; '}{', '.join(found)}".rstrip())
    return caught


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:], SABOTEURS, lambda line: print(line, flush=True)))  # noqa: T201
