"""`attn kernels`: what each kernel declares."""

from __future__ import annotations

import click

from ..capabilities import Backward
from ..errors import UnknownKernelError, suggestion
from ..registry import registry
from .console import console, print_json, table
from .declared import as_data, listed, remaining, sizes

#: Fields of Capabilities that every row shows; of the others, those that are declared.
SHOWN = ("devices", "dtypes", "head_dims", "biases", "backward")


@click.command()
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Everything that is declared, for programs.")
def kernels(pattern: str, as_json: bool) -> None:
    """List the kernels and what each can do.

    One row per kernel and group of devices, made from the kernel's own declaration. What is not named there, the kernel
    does not do. PATTERN is a shell pattern on names.

    \b
    Examples:
        attn kernels
        attn kernels "torch/*" --json
    """
    found = registry.kernels(pattern)
    if not found:
        known = [kernel.name for kernel in registry.kernels()]
        raise UnknownKernelError(f"no kernel matches {pattern!r}.{suggestion(pattern, known)} `attn kernels` lists all")
    if as_json:
        print_json([as_data(kernel) for kernel in found])
        return
    shown = table("kernels", "kernel", "takes", "also", "backward")
    shown.columns[0].min_width = max(len(kernel.name) for kernel in found)
    for kernel in found:
        condition = registry.condition(kernel)
        own_limits = ["(further limits: see attn explain)"] if kernel.refuse is not None else []
        for capabilities in kernel.declarations:
            backward = capabilities.backward
            takes = (
                f"devices {listed(capabilities.devices)}",
                f"dtypes {listed(capabilities.dtypes)}",
                f"head_dims {sizes(capabilities.head_dims)}",
                f"biases {listed(capabilities.biases) or 'none'}",
            )
            shown.add_row(
                f"{kernel.name}\n{condition.state}",
                "\n".join(takes),
                "\n".join([*remaining(capabilities, SHOWN), *own_limits]),
                "\n".join(["yes", *remaining(backward)]) if isinstance(backward, Backward) else "no",
                style=None if condition.state == "ready" else "dim",
            )
            shown.add_section()
    console().print(shown)
