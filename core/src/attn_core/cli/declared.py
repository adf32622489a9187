"""A kernel's declaration as plain data and as words; whatever field the records have, it is in both."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

import torch

from ..bias import AttnBias
from ..capabilities import ANY_DIM, Backward, Capabilities
from ..kernel import Kernel
from ..registry import registry


def as_data(kernel: Kernel) -> dict[str, Any]:
    """Everything that `kernel` declares, and whether it can run here, for JSON."""
    condition = registry.condition(kernel)
    return {
        "kernel": kernel.name,
        "plugin": kernel.plugin,
        "state": condition.state,
        "reason": condition.reason,
        "fix": condition.fix,
        "layout": kernel.layout,
        "run": kernel.run if isinstance(kernel.run, str) else f"{kernel.run.__module__}:{kernel.run.__qualname__}",
        "calls_sdpa": kernel.calls_sdpa,
        "has_irregular_limits": kernel.refuse is not None,
        "skips": plain(kernel.skips),
        "costs": {device: plain(kernel.costs[device]) for device in sorted(kernel.costs)},
        "capabilities": [plain(capabilities) for capabilities in kernel.declarations],
    }


def plain(value: Any) -> Any:
    """`value` as JSON knows it: records as objects, ranges as their ends, sets sorted, dtypes and kinds by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, range):
        return {"from": value.start, "to": value[-1] if value else None, "step": value.step}
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, AttnBias):
        return repr(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Collection):
        return sorted((plain(item) for item in value), key=lambda item: (str(type(item)), item))
    return str(value)


def listed(values: Iterable[object]) -> str:
    """Devices, dtypes or kinds, in words."""
    return ", ".join(str(item) for item in plain(frozenset(values)))


def sizes(values: Collection[int]) -> str:
    """Accepted sizes, in words."""
    if not values:
        return "none"
    if not isinstance(values, range):
        return ", ".join(str(size) for size in sorted(values))
    to = "" if values.stop >= ANY_DIM.stop else f" to {values[-1]}"
    if values.step == 1:
        return f"from {values.start}{to}"
    return f"{values.start}, {values.start + values.step}, …{to}"


def remaining(record: Capabilities | Backward, shown: Collection[str] = ()) -> list[str]:
    """What `record` declares beside the fields in `shown`, a few words each; what is as by default is left out."""
    words = []
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in shown or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(field.name if value else f"no {field.name}")
        elif field.name.endswith("compute_capability"):
            words.append(f"{field.name} sm_{value[0]}{value[1]}")
        elif field.name.startswith("head_dims"):
            words.append(f"{field.name} {sizes(value)}")
        elif isinstance(value, (str, int, float)):
            words.append(f"{field.name} {value}")
        else:
            words.append(f"{field.name} {listed(value) or 'none'}")
    return words
