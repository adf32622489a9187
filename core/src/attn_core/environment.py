"""The one reader of environment variables.

ATTN_PLUGINS   allow-list of plugins, comma-separated; set but empty: the built-in alone
ATTN_BLOCK     deny-list of plugins: not even imported
ATTN_PREFER    kernel name patterns, the most preferred first, such as "flash/*,torch/flash"
ATTN_ALLOW     what else may be chosen: "approximate"
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import InputError

ALLOWABLE = frozenset({"approximate"})


@dataclass(frozen=True, kw_only=True)
class Environment:
    plugins: tuple[str, ...] | None = None  #: None: every plugin
    block: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    allow: frozenset[str] = frozenset()


def read_environment() -> Environment:
    """What the ATTN_* variables say now. Raises InputError for a value that ATTN_ALLOW does not know."""
    plugins = os.environ.get("ATTN_PLUGINS")
    return Environment(
        plugins=None if plugins is None else _listed(plugins),
        block=_listed(os.environ.get("ATTN_BLOCK", "")),
        prefer=_listed(os.environ.get("ATTN_PREFER", "")),
        allow=check_allowed(_listed(os.environ.get("ATTN_ALLOW", "")), "ATTN_ALLOW"),
    )


def check_allowed(names: tuple[str, ...], where: str) -> frozenset[str]:
    unknown = sorted(set(names) - ALLOWABLE)
    if unknown:
        raise InputError(f"{where}: takes {', '.join(sorted(ALLOWABLE))}; got {', '.join(map(repr, unknown))}")
    return frozenset(names)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
