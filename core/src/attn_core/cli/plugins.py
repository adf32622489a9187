"""`attn plugins`: which plugins were found, and why some offer nothing."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..registry import registry
from .console import console, print_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
def plugins(as_json: bool) -> None:
    """List the plugins and their states.

    ready: it offers kernels. broken: its import or its hook failed, or it was made for another attn-core. unavailable:
    switched off by ATTN_PLUGINS or ATTN_BLOCK.

    \b
    Example:
        ATTN_BLOCK=flash attn plugins
    """
    found = registry.plugins()
    if as_json:
        print_json([asdict(plugin) for plugin in found])
        return
    shown = table("plugins", "plugin", "state", "distribution", "entry point", "kernels", "reason", "to type")
    for plugin in found:
        shown.add_row(
            plugin.name,
            plugin.state,
            f"{plugin.distribution} {plugin.version}".strip() or "(none)",
            plugin.entry_point,
            "\n".join(plugin.kernels),
            plugin.reason,
            plugin.fix or "",
            style={"broken": "red", "unavailable": "dim"}.get(plugin.state),
        )
    console().print(shown)
