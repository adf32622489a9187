"""What `report(model)` of a host returns: the modules of a model that compute attention, and who computes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from rich.table import Table

TORCH_HOST = "attn_core.integrations.torch"


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """A module that computes attention.

    `redirected`: its attention is computed by attn. `reason`: why not, or a word on how.
    """

    module: str  #: its dotted name in the model
    kind: str  #: module and class
    redirected: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows that can be iterated, looked up by a module's name, and printed; equal ones are joined when printed."""

    rows: tuple[ReportRow, ...]

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, module: str) -> ReportRow:
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(module)

    @property
    def redirected(self) -> list[ReportRow]:
        """Modules whose attention is computed by attn."""
        return [row for row in self.rows if row.redirected]

    @property
    def left_alone(self) -> list[ReportRow]:
        """Modules that compute as their library has them; each row has its reason."""
        return [row for row in self.rows if not row.redirected]

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain data, for JSON."""
        return [vars(row).copy() for row in self.rows]

    def _joined(self) -> dict[tuple[bool, str, str], list[str]]:
        """Names of the modules of one kind and answer."""
        joined: dict[tuple[bool, str, str], list[str]] = {}
        for row in self.redirected + self.left_alone:
            joined.setdefault((row.redirected, row.kind, row.reason), []).append(row.module)
        return joined

    def __str__(self) -> str:
        lines = [f"{len(self.redirected)} modules by attn, {len(self.left_alone)} left alone"]
        for (redirected, kind, reason), names in self._joined().items():
            answer = "attn" if redirected else "left alone"
            lines.append(f"  {answer}: {_some(names)} ({kind}){f': {reason}' if reason else ''}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="attention by attn")
        for column in ("modules", "kind", "by attn", "why"):
            table.add_column(column)
        for (redirected, kind, reason), names in self._joined().items():
            table.add_row(_some(names), kind, "yes" if redirected else "no", reason)
        return table


def by_torch(module: nn.Module, what: str = "calls torch's attention itself") -> tuple[bool, str]:
    """(whether it is redirected, why or why not) of a module that only the integration of torch reaches."""
    host = sys.modules.get(TORCH_HOST)
    if host is not None and host.is_swapped(module):
        return True, f"swapped by {TORCH_HOST}"
    if host is not None and host.is_enabled():
        return True, f"{what}; redirected by {TORCH_HOST}"
    return False, f'{what}; attn_core.enable("torch") redirects it'


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {names[-1]} ({len(names)} modules)"
