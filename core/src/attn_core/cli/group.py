"""`attn`: the group of commands, its own and those of plugins.

A plugin's command is a click command behind an entry point of group `attn.commands`. It is loaded when it is called, or
listed by `--help`. One that cannot be loaded is listed as broken, with the reason; the others work.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any, TextIO

import click
import torch

from ..errors import AttnError, PluginWarning
from ..versions import core_version

GROUP = "attn.commands"

#: The commands of the core: name -> "module:object".
BUILT_IN = {
    "bench-model": "attn_core.cli.bench_model:bench_model",
    "cache": "attn_core.cli.cache:cache",
    "calibrate": "attn_core.cli.calibrate:calibrate",
    "check": "attn_core.cli.check:check",
    "demo": "attn_core.cli.demo:demo",
    "doctor": "attn_core.cli.doctor:doctor",
    "explain": "attn_core.cli.explain:explain",
    "kernels": "attn_core.cli.kernels:kernels",
    "new": "attn_core.cli.new:new",
    "plugins": "attn_core.cli.plugins:plugins",
    "report": "attn_core.cli.report:report",
    "show": "attn_core.cli.show:show",
}


class Failure(click.ClickException):
    """An error for people: its message and nothing else on standard error, exit code 2."""

    exit_code = 2


class BrokenCommand(click.Command):
    """Stands for a plugin's command that cannot be loaded; called, it says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, short_help=f"(broken) {reason}", context_settings={"ignore_unknown_options": True})
        self.reason = reason
        self.params = [click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)]

    def invoke(self, ctx: click.Context) -> Any:
        raise Failure(f"command {self.name!r} is broken: {self.reason}")


class Commands(click.Group):
    """Finds commands by name, without importing the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*BUILT_IN, *plugin_commands()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in BUILT_IN:
            module, _, attribute = BUILT_IN[name].partition(":")
            return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
        found = plugin_commands().get(name)
        return None if found is None else load_command(name, found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, but a reason is written out: click would cut it to a line."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            text = command.short_help or command.get_short_help_str(limit=200)
            rows.append((name, text))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", PluginWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except AttnError as error:
                raise Failure(str(error)) from error


def plugin_commands() -> dict[str, list[Any]]:
    """Entry points of group `attn.commands`, by the name of the command."""
    import importlib_metadata

    found: dict[str, list[Any]] = {}
    for entry_point in importlib_metadata.entry_points(group=GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def load_command(name: str, entry_points: list[Any]) -> click.Command:
    """The command behind `entry_points`, or one that says why it is broken."""
    if len(entry_points) > 1:
        owners = " and ".join(sorted("?" if e.dist is None else e.dist.name for e in entry_points))
        return BrokenCommand(name, f"{owners} both offer it; uninstall one of them")
    try:
        command = entry_points[0].load()
    except (Exception, SystemExit) as error:  # the plugin line: a stranger's import may raise anything
        return BrokenCommand(name, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return BrokenCommand(name, f"{entry_points[0].value} must be a click command, got {type(command).__name__}")
    return command


def broken_commands() -> dict[str, str]:
    """Commands of plugins that cannot be used: name -> reason."""
    broken = {}
    for name, entry_points in sorted(plugin_commands().items()):
        if name in BUILT_IN:
            broken[name] = f"{entry_points[0].value} claims the name of a command of attn itself"
            continue
        command = load_command(name, entry_points)
        if isinstance(command, BrokenCommand):
            broken[name] = command.reason
    return broken


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """The message alone: where in the code it was said is nothing to the user of a command."""
    print(f"warning: {message}", file=sys.stderr)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    core_version() or "from a source tree",
    prog_name="attn",
    message=f"%(prog)s %(version)s (torch {torch.__version__})",
)
def main() -> None:
    """One attention call, any kernel: what there is, what would run, and why.

    \b
    Example:
        attn explain --seqlen 4096 --heads 32 --kv-heads 8 --causal top-left
    """
