"""Measured constants on disk: what `attn calibrate` found on this machine, read at the first choice.

A file speaks for one machine and one torch. One that is of another, or cannot be read, is ignored with a reason:
constants of elsewhere are no better than those that are shipped.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .cost import Cost
from .rates import Rates, Written

FORMAT = 1
SOURCE = "calibrated"


class UnusableFileError(Exception):
    """Why a file of costs is ignored."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Constants measured on one device: by kernel, and of the adaptations."""

    device: str  #: type
    name: str  #: of the very device
    torch: str  #: version
    threads: int
    costs: Mapping[str, Cost] = field(default_factory=dict)
    rates: Rates | None = None

    @property
    def source(self) -> str:
        """What `explain` says of an estimate by these constants."""
        return f"{SOURCE}: {self.name}, {self.threads} {'thread' if self.threads == 1 else 'threads'}"

    def joined(self, older: Calibration | None) -> Calibration:
        """These constants, and of `older` those that are not among them."""
        if older is None:
            return self
        return Calibration(
            device=self.device,
            name=self.name,
            torch=self.torch,
            threads=self.threads,
            costs={**older.costs, **self.costs},
            rates=self.rates or older.rates,
        )


def device_name(device: str = "cpu") -> str:
    """The model of this machine's processor, and what torch uses of it."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass  # not Linux: the standard library knows, if anybody does
    model = model or platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def read_costs(path: Path) -> Calibration | None:
    """What the file holds for this machine; None where there is no file. Raises UnusableFileError with the reason."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableFileError(f"it cannot be read: {error}") from error
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise UnusableFileError(f"its format is {data['format']!r}, and this attn-core reads format {FORMAT}")
        found = _calibration(data["torch"], "cpu", data["devices"]["cpu"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableFileError(f"it is no file of costs: {type(error).__name__}: {error}") from error
    if found.torch != torch.__version__:
        raise UnusableFileError(f"it was measured with torch {found.torch}, and this is torch {torch.__version__}")
    here = device_name()
    if found.name != here:
        raise UnusableFileError(f"it was measured on {found.name}, and this is {here}")
    return found


def write_costs(path: Path, calibration: Calibration) -> None:
    """Writes the file at once or not at all: a reader finds the old one or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(as_data(calibration), indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def as_data(calibration: Calibration) -> dict[str, Any]:
    """Plain data, for JSON."""
    rates = calibration.rates
    return {
        "format": FORMAT,
        "torch": calibration.torch,
        "devices": {
            calibration.device: {
                "name": calibration.name,
                "threads": calibration.threads,
                "kernels": {name: _numbers(cost) for name, cost in sorted(calibration.costs.items())},
                "adaptations": None
                if rates is None
                else {
                    "call": rates.call,
                    "copy": rates.copy,
                    "written": {kind: _numbers(rate) for kind, rate in sorted(rates.written.items())},
                },
            }
        },
    }


def _numbers(record: Cost | Written) -> dict[str, Any]:
    """Its constants; those that are nought by default and here are left out."""
    found: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, Cost):
            found[each.name] = _numbers(value)
        elif each.name not in ("source", "threads") and value is not None and value != each.default:
            found[each.name] = float(f"{value:.4g}")
    return found


def _calibration(version: Any, device: str, data: Any) -> Calibration:
    name, threads = data["name"], data["threads"]
    if not isinstance(version, str) or not isinstance(name, str) or type(threads) is not int or threads < 1:
        raise ValueError("torch, name and threads must say what was measured with")
    made = Calibration(device=device, name=name, torch=version, threads=threads)
    costs = {kernel: _cost(constants, made) for kernel, constants in data["kernels"].items()}
    rates, given = None, data["adaptations"]
    if given is not None:
        written = {kind: Written(**_checked(Written, constants)) for kind, constants in given["written"].items()}
        plain = _checked(Rates, {name: given[name] for name in ("call", "copy")})
        rates = Rates(**plain, written=written, threads=threads, source=made.source)
    return Calibration(device=device, name=name, torch=version, threads=threads, costs=costs, rates=rates)


def _cost(constants: Any, of: Calibration) -> Cost:
    nested = constants.get("with_backward")
    plain = {name: value for name, value in constants.items() if name != "with_backward"}
    given = _checked(Cost, plain)
    if nested is not None:
        given["with_backward"] = _cost(nested, of)
    return Cost(**given, threads=of.threads, source=of.source)


def _checked(kind: type[Any], constants: dict[str, Any]) -> dict[str, Any]:
    """The constants, where they are such as `kind` has: finite numbers, of nought or more."""
    known = {each.name: each for each in fields(kind)}
    for name, value in constants.items():
        if name not in known or name in ("source", "threads", "written", "with_backward"):
            raise ValueError(f"{kind.__name__} has no constant {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a number of seconds, got {value!r}")
    required = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in required if name not in constants]
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    return {name: float(value) for name, value in constants.items()}
