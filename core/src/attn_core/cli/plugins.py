"""`attn plugins`: which plugins were found, where each comes from, and why some offer nothing."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..origin import file_of
from ..registry import registry
from .console import console, print_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
def plugins(as_json: bool) -> None:
    """List the plugins, their states, and where each comes from: distribution, version, entry point and file.

    ready: it offers kernels. broken: its import or its hook failed, or it was made for another attn-core. unavailable:
    switched off by ATTN_PLUGINS or ATTN_BLOCK, and not imported; its file is found without running any of it.

    \b
    Example:
        ATTN_BLOCK=flash attn plugins
    """
    found = registry.plugins()
    if as_json:
        print_json([{**asdict(plugin), "file": file_of(plugin.entry_point)} for plugin in found])
        return
    shown = table("plugins", "plugin", "state", "distribution", "entry point", "file", "kernels", "reason", "to type")
    for plugin in found:
        shown.add_row(
            plugin.name,
            plugin.state,
            f"{plugin.distribution} {plugin.version}".strip() or "(none)",
            plugin.entry_point,
            file_of(plugin.entry_point) or "(not found)",
            "\n".join(plugin.kernels),
            plugin.reason,
            plugin.fix or "",
            style={"broken": "red", "unavailable": "dim"}.get(plugin.state),
        )
    console().print(shown)
