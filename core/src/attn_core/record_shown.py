"""A record for people: lines of text, a table of rich, HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from .record import Row

NUMBERS = ("calls", "ms")
STYLE = "text-align:{align};padding:2px 8px;border-bottom:1px solid #8884;vertical-align:top"


def as_text(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        calls = "traced" if row.compiled else f"{row.calls} calls, {1e3 * (row.seconds or 0):.3g} ms"
        module = f"{row.module}: " if row.module else ""
        extra = f" [{', '.join(row.adaptations)}]" if row.adaptations else ""
        reason = f" ({row.reason})" if row.reason else ""
        lines.append(f"{module}{row.kernel}{extra}: {calls}: {row.problem or ''}{reason}")
    return "\n".join(lines) or "no calls"


def as_table(rows: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text  # what is in brackets is no style

    table = Table(title="what ran")
    for column in _columns(rows):
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row, rows)))
    return table


def as_html(rows: Sequence[Row]) -> str:
    """A table that needs nothing from outside; what rows say is escaped."""
    from html import escape  # three milliseconds, for notebooks alone

    def line(tag: str, cells: Sequence[str]) -> str:
        made = []
        for column, cell in zip(_columns(rows), cells):
            style = STYLE.format(align="right" if column in NUMBERS else "left")
            made.append(f'<{tag} style="{style}">{escape(cell)}</{tag}>')
        return f"<tr>{''.join(made)}</tr>"

    if not rows:
        return "<p>no calls</p>"
    body = "".join(line("td", _cells(row, rows)) for row in rows)
    return f'<table style="border-collapse:collapse">{line("th", _columns(rows))}{body}</table>'


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    columns = ("kernel", "calls", "ms", "problem", "adaptations", "why")
    return ("module", *columns) if any(row.module for row in rows) else columns


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    calls = "traced" if row.compiled else str(row.calls)
    ms = "" if row.seconds is None else f"{1e3 * row.seconds:.3g}"
    asked, why = ("" if row.problem is None else str(row.problem)), row.reason
    if row.compiled and not asked:  # of a traced choice, what was asked is text
        asked, why = why, ""
    cells = (row.kernel, calls, ms, asked, ", ".join(row.adaptations), why)
    return (row.module, *cells) if any(each.module for each in rows) else cells
