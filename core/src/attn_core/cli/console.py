"""Printing for people: tables as wide as their content where nobody watches a terminal, so that nothing is cut off."""

from __future__ import annotations

import io
import json
import sys

from rich.console import Console
from rich.table import Table

#: Columns where standard output is no terminal: more than any table needs.
UNLIMITED = 10_000


def console() -> Console:
    """The console on standard output. What its encoding cannot show becomes a question mark, not an error."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and not out.encoding.lower().startswith("utf"):
        out.reconfigure(errors="replace")
    watched = out.isatty()
    width = None if watched else UNLIMITED
    # Without markup: in `pip install attn-flash[fa2]` the brackets are not a style.
    return Console(file=out, width=width, markup=False, emoji=False, highlight=False)


def table(title: str, *columns: str) -> Table:
    """A table whose cells wrap where the terminal is narrow."""
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_json(data: object) -> None:
    """`data` on standard output, as JSON for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, sort_keys=False))
