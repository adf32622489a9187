"""Figures of `attn bench-model` as a PNG, by matplotlib: a line of panels for each model, a bar for each way to run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench_model.results import AGAIN
from ..errors import InputError
from ..integrations.missing import need
from .picture import FIX

if TYPE_CHECKING:
    from ..bench_model import Measured, Row

COLOURS = {"forward": "#1f4e79", "train": "#e08214"}
MIB = 2**20
WIDTH, HEIGHT, BESIDE, DPI = 4.2, 0.42, 1.3, 100  #: inches of a panel, of a bar, of what is around bars


def check(path: Path) -> None:
    """Raises InputError for what is no .png, MissingPackageError without matplotlib."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot writes a .png, got {str(path)!r}")
    _library("matplotlib")


def _library(module: str) -> Any:
    return need(module, "attn bench-model --plot", FIX)


def _of_stock(row: Row) -> float | None:
    return row.of_stock


def _memory(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / MIB


def _difference(row: Row) -> float | None:
    """Of gradients where there are any; what is no number, or nothing, has no bar."""
    found = row.gradients or row.outputs
    return None if found is None or not math.isfinite(found.value) or not found.value else found.value


#: (title, figure of a row, whether on a logarithmic scale)
PANELS: tuple[tuple[str, Callable[[Row], float | None], bool], ...] = (
    ("time of a step, stock = 1", _of_stock, False),
    ("peak memory of a step, MiB", _memory, False),
    ("largest difference to eager\n(train: of gradients)", _difference, True),
)


def png(found: list[Measured]) -> bytes:
    """The picture."""
    figure_module = _library("matplotlib.figure")
    names = [list(dict.fromkeys(row.by for row in measured.rows)) for measured in found]
    heights = [BESIDE + HEIGHT * len(each) for each in names]
    size = (WIDTH * len(PANELS) + BESIDE, sum(heights))
    figure = figure_module.Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(found), len(PANELS), squeeze=False, gridspec_kw={"height_ratios": heights})
    for measured, ways, line in zip(found, names, grid):
        for axes, (title, value, logarithmic) in zip(line, PANELS):
            shown = ways if value is _of_stock else [by for by in ways if by != AGAIN]
            _draw(axes, measured, shown, value, logarithmic)
            axes.set_title(title, fontsize=9)
        line[0].set_ylabel(f"{measured.model}\n{measured.inputs}\n{measured.dtype}", fontsize=8)
        line[-1].legend(fontsize=8, loc="lower right")
    figure.supxlabel(", ".join(dict.fromkeys(measured.device for measured in found)), fontsize=8)
    file = io.BytesIO()
    # Without the version of matplotlib, which says nothing of the picture.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw(
    axes: Any, measured: Measured, ways: list[str], value: Callable[[Row], float | None], logarithmic: bool
) -> None:
    steps = list(dict.fromkeys(row.step for row in measured.rows))
    thick = 0.8 / len(steps)
    states: dict[str, set[str]] = {}
    drawn: list[float] = []
    for number, step in enumerate(steps):
        rows = {row.by: row for row in measured.rows if row.step == step}
        for by, row in rows.items():
            states.setdefault(by, set()).add(row.state)
        values = {by: value(row) for by, row in rows.items()}
        places = [place + (number - (len(steps) - 1) / 2) * thick for place, by in enumerate(ways) if values.get(by)]
        bars = [bar for bar in map(values.get, ways) if bar]
        axes.barh(places, bars, height=thick, color=COLOURS[step], label=step)
        drawn += bars
    labels = [by if "ran" in states[by] else f"{by} ({', '.join(sorted(states[by]))})" for by in ways]
    axes.set_yticks(range(len(ways)), labels, fontsize=8)
    axes.set_ylim(len(ways) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    if logarithmic and drawn:
        axes.set_xscale("log")
        axes.set_xlim(10.0 ** (math.floor(math.log10(min(drawn))) - 1), 10.0 ** math.ceil(math.log10(max(drawn)) + 0.1))
