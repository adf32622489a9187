"""`attn doctor`: the environment, what is amiss in it, and what to type."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import click
import torch

from .. import known_bad
from ..costs_file import SOURCE
from ..door import compute_capability
from ..environment import Environment, path_of_costs, read_environment
from ..errors import suggestion
from ..registry import registry
from ..scope import current
from ..versions import core_version
from .console import console, print_json, table
from .group import broken_commands

#: The variables that attn reads.
VARIABLES = tuple(f"ATTN_{field.name.upper()}" for field in fields(Environment))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it could be.

    `state` is "broken" (somebody should act), or "absent", "unavailable", "failed" (it can be like that on purpose),
    or, for a variable or the file of measured costs, "ignored" (it has no effect), or, of a kernel, "known-bad" (it
    refuses the problems that are named), "allowed" (the environment overrules that).
    """

    what: str  #: "plugin", "kernel", "command", "variable", "costs" or "known-bad"
    name: str
    state: str
    reason: str
    fix: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool) -> None:
    """Examine this installation: what is there, what is not, and what to type about it.

    Exit code 1 if something is broken. What is absent or not for this machine is listed, but no failure.

    \b
    Example:
        attn doctor --json > report.json
    """
    facts, variables, found = environment(), variables_in_force(), list(findings())
    if as_json:
        print_json({"environment": facts, "variables": variables, "findings": [asdict(f) for f in found]})
    else:
        out = console()
        shown = table("environment", "what", "here")
        for name, value in facts.items():
            shown.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
        for name, text in variables.items():
            shown.add_row(name, repr(text))
        out.print(shown)
        out.print(_findings_table(found) if found else "Nothing is amiss.")
    if any(finding.state == "broken" for finding in found):
        ctx.exit(1)


def environment() -> dict[str, Any]:
    """Versions and devices of this process."""
    return {
        "attn-core": core_version() or "from a source tree",
        "plugins": [
            f"{plugin.name}: {plugin.distribution or '(no distribution)'} {plugin.version}".strip()
            for plugin in registry.plugins()
        ],
        "Python": f"{platform.python_version()} ({sys.executable})",
        "operating system": platform.platform(),
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none: built without",
        "GPUs": _gpus() or "none",
        "threads of torch": torch.get_num_threads(),
        "estimates": _estimates(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }


def _estimates() -> str:
    """Where the constants of the estimates come from."""
    measured = registry.calibration
    if measured is None:
        return "by the shipped constants"
    return f"{SOURCE} ({path_of_costs(read_environment())}): {', '.join(sorted(measured.costs))}"


def variables_in_force() -> dict[str, str]:
    """ATTN_* variables that are set."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("ATTN_")}


def findings() -> Iterator[Finding]:
    """What is broken, absent, unavailable or without effect."""
    for plugin in registry.plugins():
        if plugin.state != "ready":
            fix = plugin.fix
            if fix is None and plugin.state == "broken":
                fix = f"pip install -U {plugin.distribution or plugin.name}\nor switch it off: ATTN_BLOCK={plugin.name}"
            yield Finding(what="plugin", name=plugin.name, state=plugin.state, reason=plugin.reason, fix=fix)
    for kernel in registry.kernels():
        condition = registry.condition(kernel)
        if condition.state != "ready":
            text, fix = condition.reason, condition.fix
            yield Finding(what="kernel", name=kernel.name, state=condition.state, reason=text, fix=fix)
    yield from _findings_of_known_bad()
    for name, reason in broken_commands().items():
        yield Finding(what="command", name=name, state="broken", reason=reason)
    if registry.ignored_costs is not None:
        path, reason = registry.ignored_costs
        yield Finding(what="costs", name=path, state="ignored", reason=reason, fix="attn calibrate")
    yield from _findings_of_variables()


def _findings_of_known_bad() -> Iterator[Finding]:
    """What is known to be bad of the kernels that can run here, on the devices that are here."""
    devices: set[tuple[str, tuple[int, int] | None]] = {("cpu", None)}
    if torch.cuda.is_available():
        devices |= {("cuda", compute_capability(index)) for index in range(torch.cuda.device_count())}
    settings = current.get().settings
    for kernel in registry.kernels():
        if registry.condition(kernel).state not in ("ready", "failed"):
            continue
        state = "allowed" if known_bad.overruled(kernel.name, settings) else "known-bad"
        rows = [row for device in sorted(devices) for row in known_bad.rows_for(kernel.name, *device)]
        for row in {id(row): row for row in rows}.values():  # two devices alike have the same
            text = f"with {row.conditions()}: {row.what}; {row.link}"
            fix = f"ATTN_ALLOW_KNOWN_BAD={kernel.name}" if state == "known-bad" else None
            yield Finding(what="known-bad", name=kernel.name, state=state, reason=text, fix=fix)


def _findings_of_variables() -> Iterator[Finding]:
    for name in variables_in_force():
        if name not in VARIABLES:
            text = f"attn reads no such variable.{suggestion(name, VARIABLES)}"
            yield Finding(what="variable", name=name, state="ignored", reason=text, fix=f"unset {name}")
    read = read_environment()
    plugins = [plugin.name for plugin in registry.plugins()]
    kernels = [kernel.name for kernel in registry.kernels()]
    for variable, names in (("ATTN_PLUGINS", read.plugins or ()), ("ATTN_BLOCK", read.block)):
        for name in names:
            if name not in plugins:
                text = f"no plugin {name!r} is installed.{suggestion(name, plugins)}"
                yield Finding(what="variable", name=variable, state="ignored", reason=text)
    for variable, patterns in (("ATTN_PREFER", read.prefer), ("ATTN_ALLOW_KNOWN_BAD", read.allow_known_bad)):
        for pattern in patterns:
            if not any(fnmatchcase(kernel, pattern) for kernel in kernels):
                text = f"no kernel matches {pattern!r}.{suggestion(pattern, kernels)}"
                yield Finding(what="variable", name=variable, state="ignored", reason=text)


def _findings_table(found: list[Finding]) -> Any:
    shown = table("findings", "what", "name", "state", "reason", "to type")
    for finding in found:
        style = "red" if finding.state == "broken" else None
        shown.add_row(finding.what, finding.name, finding.state, finding.reason, finding.fix or "", style=style)
    return shown


def _gpus() -> list[str]:
    """Names, compute capabilities and memory of the CUDA devices; other accelerators by name."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found.append(f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB")
        return found
    return ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
