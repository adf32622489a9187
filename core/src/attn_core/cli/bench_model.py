"""`attn bench-model`: how fast, how large and how right models are under each kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from ..errors import InputError
from ..versions import core_version
from .console import console, table
from .explain import DTYPES
from .report import Setting

if TYPE_CHECKING:
    from ..bench_model import BuiltModel, Difference, Measured, Row

FORMAT = 1
BATCH, SEQLEN, ROUNDS = 1, 128, 5
MIB = 2**20
#: Lines of a reason that a table shows; JSON has all.
REASONS = 4


@click.command("bench-model")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--kernel", "kernels", multiple=True, metavar="PATTERN", help="Only these kernels; repeatable.")
@click.option("--batch", type=click.IntRange(1), default=BATCH, show_default=True, metavar="N", help="Per step.")
@click.option("--size", type=click.IntRange(1), metavar="PIXELS", help="Of images; default: the model's own.")
@click.option(
    "--seqlen", type=click.IntRange(1), default=SEQLEN, show_default=True, metavar="N", help="For models of text."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, metavar="NAME", help="Of weights."
)
@click.option("--device", default="cpu", show_default=True, help="Such as cuda.")
@click.option("--set", "settings", multiple=True, type=Setting(), help="An argument of the model, or of its config.")
@click.option("--forward", is_flag=True, help="Only a forward without gradients.")
@click.option("--train", is_flag=True, help="Only forward and backward, in training mode.")
@click.option("--rounds", type=click.IntRange(0), default=ROUNDS, show_default=True, metavar="N", help="Of timing.")
@click.option("--no-memory", is_flag=True, help="Measure no memory.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write all figures there; - prints them instead of the tables.",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a picture, a .png.",
)
def bench_model(
    models: tuple[str, ...],
    kernels: tuple[str, ...],
    batch: int,
    size: int | None,
    seqlen: int,
    dtype: str,
    device: str,
    settings: tuple[tuple[str, Any], ...],
    forward: bool,
    train: bool,
    rounds: int,
    no_memory: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Run models under each kernel: time, memory, and the largest difference to eager.

    MODEL is a name of timm, or a kind of model of transformers; its weights are random, nothing is fetched. Each is run
    eagerly (its attention multiplied out), stock (as its library does by default), by attn, and by each kernel alone,
    in one forward and in one training step. A kernel that does not take the model's calls is a row with its reasons.
    The ways take turns, and times are compared with stock within each round. --plot needs attn-core[show].

    \b
    Examples:
        attn bench-model vit_base_patch16_224
        attn bench-model bert --seqlen 512 --kernel "torch/*" --json bert.json
        attn bench-model swin_base_patch4_window7_224 hiera_base_224 --train --batch 8 --plot models.png
        attn bench-model llama --set num_hidden_layers=4 --seqlen 1024 --device cuda --dtype bfloat16
    """
    _check_files(json_file, plot_file)
    from ..bench_model import bench_model as measure
    from ..bench_model.bench import chosen_kernels
    from ..bench_model.results import FORWARD, TRAIN
    from ..integrations.hosts import disable
    from .report_models import Wanted, library_of

    where = _device(device)
    chosen_kernels(kernels, where)  # an unknown one is said before a model is built
    wanted = [
        Wanted(
            name=name,
            batch=batch,
            size=size,
            seqlen=seqlen,
            dtype=getattr(torch, dtype),
            device=where,
            settings=dict(settings),
        )
        for name in models
    ]
    disable()  # what ATTN_ENABLE enabled: each way says for itself
    steps = (FORWARD,) if forward and not train else (TRAIN,) if train and not forward else (FORWARD, TRAIN)
    printed = json_file is not None and str(json_file) == "-"
    found: list[Measured] = []
    failures: list[str] = []
    built: BuiltModel | None
    with _progress() as begin:
        libraries = []
        for each in wanted:
            begin(f"looking for {each.name}")
            libraries.append(library_of(each.name))
        for each, library in zip(wanted, libraries):
            tell = begin(f"building {each.name}")
            try:
                built = _built(each, library)
                found.append(
                    measure(
                        built, kernels=kernels, steps=steps, rounds=rounds, memory=not no_memory, tell=_of(tell, each)
                    )
                )
            except InputError as error:  # this model cannot be built or run like that; what others gave is kept
                failures.append(str(error))
            built = None
    if not found:
        raise InputError("\n".join(failures))
    data = {
        "format": FORMAT,
        "attn_core": core_version(),
        "torch": torch.__version__,
        "rounds": rounds,
        "models": [measured.to_dict() for measured in found],
    }
    if printed:
        click.echo(json.dumps(data, indent=2, allow_nan=False))
    else:
        _show(found)
    if json_file is not None and not printed:
        _write(json_file, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode(), "--json")
    if plot_file is not None:
        from .bench_picture import png

        _write(plot_file, png(found), "--plot")
    for path in (json_file, plot_file):
        if path is not None and not printed:
            console().print(f"written to {path}", soft_wrap=True)
    if failures:
        raise InputError("\n".join(failures))


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Raises InputError where a file could not be written, MissingPackageError without matplotlib: before measuring."""
    if plot_file is not None:
        from .bench_picture import check

        check(plot_file)
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is None or str(path) == "-":
            continue
        if not path.parent.is_dir():
            raise InputError(f"{option}: there is no folder {str(path.parent)!r}")
        target = path if path.exists() else path.parent
        if path.is_dir() or not os.access(target, os.W_OK):
            raise InputError(f"{option}: {str(path)!r} cannot be written")


def _write(path: Path, data: bytes, option: str) -> None:
    """The file appears under its name only when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{option}: {str(path)!r} cannot be written: {error.strerror or error}") from error


def _device(name: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--device {name}: {reason}") from error
    if device.type == "meta":
        raise InputError("--device meta: nothing runs there, so nothing can be measured")
    return device


def _built(wanted: Any, library: str) -> BuiltModel:
    from ..bench_model import BuiltModel
    from .report_models import build, inputs_of

    model = build(library, wanted)
    return BuiltModel(name=wanted.name, host=library, model=model, inputs=inputs_of(library, model, wanted))


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[str, float], None]]]:
    """Yields what begins a bar: given its text, it returns what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def begin(text: str) -> Callable[[str, float], None]:
            progress.reset(task, description=text)
            return lambda what, share: progress.update(task, description=what, completed=share)

        yield begin


def _of(tell: Callable[[str, float], None], wanted: Any) -> Callable[[str, float], None]:
    return lambda what, share: tell(f"{wanted.name}: {what}", share)


def _show(found: list[Measured]) -> None:
    to = console()
    for measured in found:
        told = f"{measured.model} of {measured.host} {measured.host_version}, {measured.parameters / 1e6:.1f} million"
        to.print(f"{told} parameters, {measured.inputs}, {measured.dtype}", style="bold", soft_wrap=True)
        to.print(f"on {measured.device}", soft_wrap=True)
        for kind in dict.fromkeys(row.step for row in measured.rows):
            to.print(_table(kind, [row for row in measured.rows if row.step == kind]))
        for each in measured.left_alone:
            to.print(f"not by attn: {each}", soft_wrap=True)
    if found:
        to.print(f"memory: {found[0].memory}", soft_wrap=True)


def _table(kind: str, rows: list[Row]) -> Any:
    gradients = any(row.gradients is not None for row in rows)
    columns = ["by", "ms", "of stock's", "peak MiB", "outputs differ", *(["gradients differ"] if gradients else [])]
    shown = table(kind, *columns, "attention")
    shown.caption, shown.caption_justify = _scale(rows), "left"
    shown.columns[0].min_width = max(len(row.by) for row in rows)
    for row in rows:
        if row.state == "ran":
            cells = [
                "" if row.seconds_median is None else f"{1e3 * row.seconds_median:.3g}",
                "" if row.of_stock is None else f"{row.of_stock:.2f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.1f}",
                _difference(row.outputs),
                *([_difference(row.gradients)] if gradients else []),
                ", ".join(f"{name} x{calls}" for name, calls in row.calls.items()),
            ]
        else:
            cells = [""] * (len(columns) - 1) + [f"{row.state}: {in_short(row.reason)}"]
        shown.add_row(row.by, *cells, style=None if row.state == "ran" else "dim")
    return shown


def _difference(difference: Difference | None) -> str:
    return "" if difference is None else f"{difference.value:.1e}"


def _scale(rows: list[Row]) -> str | None:
    """What differences are to be compared with."""
    first = next((row for row in rows if row.outputs is not None), None)
    if first is None or first.outputs is None:
        return None
    text = f"of eager, the largest output is {first.outputs.largest:.2g}"
    return text if first.gradients is None else f"{text}, the largest gradient {first.gradients.largest:.2g}"


def in_short(reason: str) -> str:
    """The reasons proper of a refusal, without the problem before them and the advice behind them."""
    lines = [line for line in reason.splitlines() if line.strip()]
    proper = [line.strip() for line in lines if line.startswith(" ")]
    return "\n".join((proper or lines)[:REASONS])
