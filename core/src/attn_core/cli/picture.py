"""Matrices of biases as a PNG, by matplotlib.

Every cell has the same whole number of pixels, and the file says in its text "Description" where each matrix begins, so
that what was drawn can be read back from it. The file appears under its name only when it is whole.
"""

from __future__ import annotations

import io
import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bias.drawing import is_mask
from ..errors import InputError
from ..integrations.missing import need

FIX = 'pip install "attn-core[show]"'
MAX_SIDE = 2048  #: cells of a picture
DPI = 100
SIDE, MAX_CELL = 360, 24  #: pixels of a matrix where its cells are not smaller than one, and of a cell
LEFT, RIGHT, BOTTOM, LINE = 56, 24, 48, 16  #: pixels beside a matrix, and of a line of its title
BAR, BAR_WIDTH = 84, 14  #: pixels for the scale of what is added
NARROWEST = 220  #: pixels of a panel, for its title
PER_LINE = 3  #: panels
GRID_FROM = 8  #: pixels of a cell from which lines divide them

KEPT, MASKED, ODD, LINES = "#1f4e79", "#ededed", "#c62828", "#ffffff"
SHADES = "viridis"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One matrix of a picture."""

    title: str
    cells: Tensor  #: `[seqlen_q, seqlen_kv]`, as `attn_core.bias.drawing.cells` has them


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One matrix that was read from a picture."""

    title: str
    colours: Tensor  #: `[seqlen_q, seqlen_kv, 3]` in [0, 1]


def check(path: Path) -> None:
    """Raises InputError where no PNG can be written there, MissingPackageError without matplotlib."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out writes a .png, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"--out: there is no folder {str(path.parent)!r}")
    _library("matplotlib")


def _library(module: str) -> Any:
    return need(module, "attn show --out", FIX)


def write(path: Path, panels: list[Panel]) -> None:
    """Writes the panels as one PNG, whole or not at all. Raises InputError where the file cannot be written."""
    data = png(panels)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"--out: {str(path)!r} cannot be written: {error.strerror or error}") from error


def png(panels: list[Panel]) -> bytes:
    """The panels beside each other, three to a line."""
    figure_module = _library("matplotlib.figure")
    sizes = [_size(panel) for panel in panels]
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    across = min(len(panels), PER_LINE)
    down = -(-len(panels) // PER_LINE)
    figure = figure_module.Figure(figsize=(width * across / DPI, height * down / DPI), dpi=DPI)
    places = []
    for number, panel in enumerate(panels):
        left, top = number % PER_LINE * width + LEFT, number // PER_LINE * height + _title_height(panel)
        places.append({"title": panel.title, "left": left, "top": top, **_draw(figure, panel, left, top)})
    file = io.BytesIO()
    # Without the version of matplotlib, which says nothing of the picture.
    metadata = {"Description": json.dumps(places), "Software": None}
    figure.savefig(file, format="png", metadata=metadata, pil_kwargs={"optimize": True})
    return file.getvalue()


def _cell(panel: Panel) -> int:
    """Pixels of a cell."""
    rows, columns = panel.cells.shape
    return max(1, min(MAX_CELL, SIDE // max(1, rows, columns)))


def _size(panel: Panel) -> tuple[int, int]:
    """Pixels of a panel with all that is around it."""
    rows, columns = panel.cells.shape
    cell = _cell(panel)
    beside = LEFT + RIGHT + (0 if is_mask(panel.cells) else BAR)
    return max(NARROWEST, columns * cell + beside), rows * cell + BOTTOM + _title_height(panel)


def _title_lines(panel: Panel) -> list[str]:
    # The narrowest a panel can be: others may only make it wider. A character takes about 6 pixels.
    wide = max(NARROWEST, panel.cells.shape[1] * _cell(panel) + LEFT + RIGHT)
    return textwrap.wrap(panel.title, max(20, wide // 6 - 4)) or [""]


def _title_height(panel: Panel) -> int:
    return LINE * len(_title_lines(panel)) + LINE


def _draw(figure: Any, panel: Panel, left: int, top: int) -> dict[str, int]:
    """Draws a panel whose matrix begins at these pixels; says how it is divided."""
    colors = _library("matplotlib.colors")
    ticker = _library("matplotlib.ticker")
    rows, columns = panel.cells.shape
    cell = _cell(panel)
    across, down = (round(size * DPI) for size in figure.get_size_inches())

    def box(x: int, y: int, wide: int, high: int) -> tuple[float, float, float, float]:
        return x / across, 1 - (y + high) / down, wide / across, high / down

    axes = figure.add_axes(box(left, top, columns * cell, rows * cell))
    for spine in axes.spines.values():
        spine.set_position(("outward", 1.5))  # the frame covers no cell
    axes.set_title("\n".join(_title_lines(panel)), fontsize=8, loc="left", pad=6)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))
    if rows and columns:
        rgb, scale = painted(panel.cells)
        axes.imshow(rgb, interpolation="nearest", aspect="auto", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        if cell >= GRID_FROM:
            axes.hlines([row - 0.5 for row in range(1, rows)], -0.5, columns - 0.5, colors=LINES, linewidths=0.5)
            axes.vlines([column - 0.5 for column in range(1, columns)], -0.5, rows - 0.5, colors=LINES, linewidths=0.5)
        if scale is not None:
            colorbar = _library("matplotlib.colorbar")
            beside = figure.add_axes(box(left + columns * cell + RIGHT // 2, top, BAR_WIDTH, rows * cell))
            colorbar.Colorbar(beside, cmap=SHADES, norm=colors.Normalize(*scale)).ax.tick_params(labelsize=7, length=2)
    return {"rows": rows, "columns": columns, "cell": cell}


def painted(cells: Tensor) -> tuple[Any, tuple[float, float] | None]:
    """The colour of each cell, `[rows, columns, 3]` in [0, 1], and between what its shades run; None for a mask."""
    colors = _library("matplotlib.colors")
    palettes = _library("matplotlib")
    values = cells.numpy()
    finite = cells.isfinite()
    scale = None
    if is_mask(cells):
        rgb = cells.new_tensor(colors.to_rgb(KEPT)).expand(*cells.shape, 3).numpy().copy()
    else:
        least, most = (0.0, 0.0) if not finite.any() else (cells[finite].min().item(), cells[finite].max().item())
        scale = (least, most) if least < most else (least - 0.5, most + 0.5)
        shade = ((cells.nan_to_num(0) / 2 - scale[0] / 2) / (scale[1] / 2 - scale[0] / 2)).clamp(0, 1)
        rgb = palettes.colormaps[SHADES](shade.numpy())[..., :3]
    rgb[~finite.numpy()] = colors.to_rgb(ODD)
    rgb[values == float("-inf")] = colors.to_rgb(MASKED)
    return rgb, scale


def read(data: bytes) -> list[Drawn]:
    """The matrices of a PNG that `png` made: the colour in the middle of each cell."""
    image_module = _library("PIL.Image")
    with image_module.open(io.BytesIO(data)) as image:
        places = json.loads(image.text["Description"])
        flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = flat.reshape(image.height, image.width, 3) / 255
    found = []
    for place in places:
        cell = place["cell"]
        rows = place["top"] + cell * torch.arange(place["rows"]) + cell // 2
        columns = place["left"] + cell * torch.arange(place["columns"]) + cell // 2
        found.append(Drawn(title=place["title"], colours=pixels[rows[:, None], columns]))
    return found
