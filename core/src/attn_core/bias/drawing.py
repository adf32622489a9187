"""The matrix of a bias, drawn: one cell for each query and key of a batch entry and head.

What is drawn is what becomes of a logit of 0: it stays 0 where nothing changes it, is -inf where it is masked, and
elsewhere is what is added. So one rule, `AttnBias.score`, draws every kind, a stranger's too.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .whole_numbers import as_int, is_count

if TYPE_CHECKING:
    from .base import AttnBias

ROWS = 16
COLUMNS = 64

MASKED = "·"
KEPT = "█"
SHADES = "░▒▓█"  #: from the least to the most that is added
ODD = "?"  #: NaN and +inf, which only a tensor of the caller's can have


@torch.no_grad()
def cells(bias: AttnBias, batch_entry: int = 0, head: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """`[seqlen_q, seqlen_kv]` of one batch entry and head, cut to `rows` and `columns`: what becomes of a logit of 0.

    float64, on the CPU; -inf is masked. Raises UnboundBiasError before `bind`, InputError for a batch entry or head
    that the bias does not have, or where it holds tensors without data.
    """
    seqlen_q, seqlen_kv = bias.bound_lengths()
    place = []
    for name, number, has in zip(("batch entry", "head"), (as_int(batch_entry), as_int(head)), bias.batch_and_heads):
        if not is_count(number) or (number >= has and has != 1):
            raise InputError(f"draw: {bias!r} has {name} 0 to {has - 1}, got {number!r}")
        place.append(number if has != 1 else 0)  # one is the same for all
    if any(tensor.is_meta for tensor in bias.held().values()):
        raise InputError(f"draw: the tensors of {bias!r} have no data")
    device = bias.device or torch.device("cpu")
    b, h = (torch.full((1, 1), number, device=device) for number in place)
    q = torch.arange(min(seqlen_q, rows), device=device)[:, None]
    k = torch.arange(min(seqlen_kv, columns), device=device)[None]
    logit = torch.zeros(q.shape[0], k.shape[1], dtype=torch.float64, device=device)
    return bias.score(logit, b, h, q, k).expand(logit.shape).to("cpu", torch.float64)


def is_mask(values: Tensor) -> bool:
    """Whether cells say nothing but kept or masked."""
    return bool(((values == 0) | (values == float("-inf"))).all())


def draw(bias: AttnBias, batch_entry: int = 0, head: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> str:
    """The cells as text, a line per query: of a mask `█` kept and `·` masked, else shades, and a line that says of
    what. `…` and `⋮` stand for columns and rows that were cut off. Errors as of `cells`."""
    values = cells(bias, batch_entry, head, rows, columns)
    seqlen_q, seqlen_kv = bias.bound_lengths()
    lines, legend = _as_mask(values) if is_mask(values) else _as_shades(values)
    if columns < seqlen_kv:
        lines = [line + " …" for line in lines]
    if rows < seqlen_q:
        lines.append("⋮")
    return "\n".join([*lines, *legend])


def as_html(bias: AttnBias) -> str:
    """For notebooks: the bias, and once it is bound its matrix."""
    text = repr(bias) if bias.lengths is None else f"{bias!r}\n{draw(bias)}"
    return f'<pre style="line-height: 1.1">{html.escape(text)}</pre>'


def _as_mask(values: Tensor) -> tuple[list[str], list[str]]:
    return ["".join(KEPT if cell else MASKED for cell in row) for row in (values == 0).tolist()], []


def _as_shades(values: Tensor) -> tuple[list[str], list[str]]:
    """Lines and legend. Shades divide what lies between the least and the most into equal parts."""
    finite = values.isfinite()
    legend = []
    shade = torch.zeros(values.shape, dtype=torch.long)
    if finite.any():
        least, most = values[finite].min().item(), values[finite].max().item()
        if least == most:
            shade += len(SHADES) - 1
            legend.append(f"{SHADES[-1]} {most:g}")
        else:
            # Halves first: the difference of two finite numbers need not be finite.
            part = ((values / 2 - least / 2) / (most / 2 - least / 2) * len(SHADES)).nan_to_num(0)
            shade = part.long().clamp(0, len(SHADES) - 1)
            steps = [least * (1 - n / len(SHADES)) + most * (n / len(SHADES)) for n in range(len(SHADES) + 1)]
            legend += [f"{mark} {low:.3g} to {high:.3g}" for mark, low, high in zip(SHADES, steps, steps[1:])]
    masked = values == float("-inf")
    marks = [
        "".join(SHADES[n] if shown else MASKED if gone else ODD for n, shown, gone in zip(*row))
        for row in zip(shade.tolist(), finite.tolist(), masked.tolist())
    ]
    if masked.any():
        legend.append(f"{MASKED} masked")
    if (~finite & ~masked).any():
        legend.append(f"{ODD} not finite")
    return marks, ["  ".join(legend)]
