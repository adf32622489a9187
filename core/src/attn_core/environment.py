"""The one reader of environment variables.

ATTN_PLUGINS      allow-list of plugins, comma-separated; set but empty: the built-in alone
ATTN_BLOCK        deny-list of plugins: not even imported
ATTN_PREFER       kernel name patterns, the most preferred first, such as "flash/*,torch/flash"
ATTN_ALLOW        what else may be chosen: "approximate", "known-bad"
ATTN_ALLOW_KNOWN_BAD  kernel name patterns: these run although known to be bad here, such as "torch/cudnn"
ATTN_ENABLE       integrations to enable when attn_core is imported, such as "transformers,timm"
ATTN_COSTS        the file of measured constants; set but empty: those that are shipped
ATTN_TENSOR_MASK  what a plain tensor as attn_mask gets: "silent", "warn" or "error"
ATTN_USAGE        a file to which calls are added when the process ends, counted by kind of bias
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

#: What is left out by default, and may be allowed.
ALLOWABLE = ("approximate", "known-bad")
TENSOR_MASK = ("silent", "warn", "error")


@dataclass(frozen=True, kw_only=True)
class Environment:
    plugins: tuple[str, ...] | None = None  #: None: every plugin
    block: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    allow: frozenset[str] = frozenset()
    allow_known_bad: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()
    costs: str | None = None  #: None: a file in the user's cache
    tensor_mask: str = "warn"
    usage: str | None = None  #: None: nothing is counted


def read_environment() -> Environment:
    """What the ATTN_* variables say now. Raises InputError for a value that one of them does not know."""
    plugins = os.environ.get("ATTN_PLUGINS")
    return Environment(
        plugins=None if plugins is None else _listed(plugins),
        block=_listed(os.environ.get("ATTN_BLOCK", "")),
        prefer=_listed(os.environ.get("ATTN_PREFER", "")),
        allow=check_allowed(_listed(os.environ.get("ATTN_ALLOW", "")), "ATTN_ALLOW"),
        allow_known_bad=_listed(os.environ.get("ATTN_ALLOW_KNOWN_BAD", "")),
        enable=hosts_to_enable(),
        costs=os.environ.get("ATTN_COSTS"),
        tensor_mask=_checked_tensor_mask(os.environ.get("ATTN_TENSOR_MASK") or "warn"),
        usage=os.environ.get("ATTN_USAGE") or None,
    )


def hosts_to_enable() -> tuple[str, ...]:
    """What ATTN_ENABLE says, whatever the other variables say: it is asked for while attn_core is imported."""
    return _listed(os.environ.get("ATTN_ENABLE", ""))


def path_of_costs(environment: Environment) -> Path | None:
    """Where measured constants are kept: as ATTN_COSTS says, else in the user's cache; None where that is set empty."""
    if environment.costs is not None:
        return Path(environment.costs).expanduser() if environment.costs.strip() else None
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "attn" / "costs.json"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "attn" / "costs.json"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "attn" / "Cache" / "costs.json"
    return Path.home() / ".cache" / "attn" / "costs.json"


def check_allowed(names: tuple[str, ...], where: str) -> frozenset[str]:
    unknown = sorted(set(names) - set(ALLOWABLE))
    if unknown:
        raise InputError(f"{where}: takes {', '.join(ALLOWABLE)}; got {', '.join(map(repr, unknown))}")
    return frozenset(names)


def _checked_tensor_mask(word: str) -> str:
    if word not in TENSOR_MASK:
        raise InputError(f"ATTN_TENSOR_MASK: takes {', '.join(TENSOR_MASK)}; got {word!r}")
    return word


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
