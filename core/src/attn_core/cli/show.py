"""`attn show`: the matrix of a bias that is written as text, in the terminal and as a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from ..bias import AttnBias
from ..bias.drawing import cells, draw
from ..errors import InputError
from .console import UNLIMITED, console
from .expression import parse
from .lengths import told
from .picture import MAX_SIDE, Panel, check, write

ROWS, COLUMNS = 64, 128  #: that are printed
MAX_SEQLEN = 2**20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags say of lengths; None where they say nothing."""

    seqlen: int | None
    seqlen_q: int | None
    seqlen_kv: int | None


@click.command()
@click.argument("expressions", nargs=-1, required=True, metavar="EXPRESSION...")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture, a .png, as well.")
@click.option(
    "--seqlen", type=click.IntRange(0), metavar="N", help="Of queries and keys; default: what the expression tells."
)
@click.option("--seqlen-q", type=click.IntRange(0), metavar="N", help="Of queries, where it differs.")
@click.option("--seqlen-kv", type=click.IntRange(0), metavar="N", help="Of keys, where it differs.")
@click.option("--batch-entry", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="That is drawn.")
@click.option("--head", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="That is drawn.")
def show(
    expressions: tuple[str, ...],
    out: Path | None,
    seqlen: int | None,
    seqlen_q: int | None,
    seqlen_kv: int | None,
    batch_entry: int,
    head: int,
) -> None:
    """Draw the matrix of each EXPRESSION, a bias written as in Python.

    A row for each query, a column for each key: of a mask, what may be attended and what not; where something is added
    to the logits, how much. The expression is parsed, not run. It may name the kinds of bias with their arguments,
    joined by & and +; tensor([...]) and random(sizes...), seed 0, stand for tensors. --out needs attn-core[show].

    \b
    Examples:
        attn show "Causal()" --seqlen 8
        attn show "Window(3, 0) & Segments([5, 9, 4])" --out mask.png
        attn show "Neighborhood((4, 5), kernel_size=3)" "Causal() + ALiBi(8)" --seqlen 20 --head 7 --out both.png
    """
    if out is not None:
        check(out)  # before anything is printed
    asked = Asked(seqlen=seqlen, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    biases = [bound(parse(text), text, asked) for text in expressions]
    if out is not None:
        for text, bias in zip(expressions, biases):
            if max(bias.bound_lengths()) > MAX_SIDE:
                raise InputError(f"show: a picture has at most {MAX_SIDE} cells a side; {text} has {_sizes(bias)}")
    to = console()
    columns = COLUMNS if to.width >= UNLIMITED else min(COLUMNS, max(to.width - 2, 1))
    drawn = [draw(bias, batch_entry, head, ROWS, columns) for bias in biases]
    panels = []
    if out is not None:
        panels = [
            Panel(title=_title(text, bias, batch_entry, head), cells=cells(bias, batch_entry, head, MAX_SIDE, MAX_SIDE))
            for text, bias in zip(expressions, biases)
        ]
    for text, bias, matrix in zip(expressions, biases, drawn):
        to.print(f"{_title(text, bias, batch_entry, head)}, {_sizes(bias)}", style="bold", soft_wrap=True)
        to.print(matrix, soft_wrap=True)
    if out is not None:
        write(out, panels)
        to.print(f"written to {out}", soft_wrap=True)


def bound(bias: AttnBias, text: str, asked: Asked) -> AttnBias:
    """The bias at the lengths of the flags, else at those that it tells."""
    wanted = []
    for own, default in zip((asked.seqlen_q, asked.seqlen_kv), told(bias)):
        given = asked.seqlen if own is None else own
        size = default if given is None else given
        if size is None:
            raise InputError(f"show: {text} does not tell how long the sequence is; say --seqlen N")
        if size > MAX_SEQLEN:
            raise InputError(f"show: lengths are at most {MAX_SEQLEN}, got {size} for {text}")
        wanted.append(size)
    return bias.bind(*wanted)


def _title(text: str, bias: AttnBias, batch_entry: int, head: int) -> str:
    """The expression, and where it differs by them, which batch entry and head."""
    batch, heads = bias.batch_and_heads
    places = [f"batch entry {batch_entry}"] * (batch > 1) + [f"head {head}"] * (heads > 1)
    return ", ".join([" ".join(text.split()), *places])


def _sizes(bias: AttnBias) -> str:
    seqlen_q, seqlen_kv = bias.bound_lengths()
    return f"{seqlen_q} queries x {seqlen_kv} keys"
