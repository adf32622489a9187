"""What a search found: saved as JSON, and loaded again where it is to be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import attn_core
import torch
from attn_core.errors import InputError

from ..autotuner.families import UNTUNABLE, family_of
from .case import Case

#: What a file says that it is.
FORMAT = "attn profile-na"
VERSION = 1
KEYS = {"format", "version", "torch", "case", "kernel", "forward", "backward", "trials"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration of a kernel in one direction."""

    kernel: str
    direction: str  #: "forward" or "backward"
    configuration: Any
    seconds: float  #: of a run; infinite where it could not run


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best kernel for a case, and its configurations; `trials` are all that were timed."""

    case: Case
    kernel: str
    forward: Any
    backward: Any  #: None where no gradient was wanted
    trials: tuple[Trial, ...] = ()
    torch: str = torch.__version__

    @classmethod
    def of(cls, case: Case, kernel: str, forward: Any, backward: Any, trials: Sequence[Trial]) -> Result:
        return cls(case=case, kernel=kernel, forward=forward, backward=backward, trials=tuple(trials))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the kernel comes first, and runs in these configurations."""
        family = family_of(self.kernel, self.case.problem()) or UNTUNABLE
        with attn_core.prefer(self.kernel), family.within(self.forward, self.backward):
            yield

    def best(self, direction: str) -> Trial | None:
        """The trial of the configuration that won; None where that direction was not timed."""
        wanted = self.forward if direction == "forward" else self.backward
        found = [
            trial
            for trial in self.trials
            if (trial.kernel, trial.direction, trial.configuration) == (self.kernel, direction, wanted)
        ]
        return found[0] if found else None

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        problem = self.case.problem()

        def written(kernel: str, configuration: Any) -> dict[str, Any]:
            return (family_of(kernel, problem) or UNTUNABLE).written(configuration)

        return {
            "format": FORMAT,
            "version": VERSION,
            "torch": self.torch,
            "case": self.case.to_dict(),
            "kernel": self.kernel,
            "forward": written(self.kernel, self.forward),
            "backward": written(self.kernel, self.backward) if self.case.backward else None,
            "trials": [
                {
                    "kernel": trial.kernel,
                    "direction": trial.direction,
                    "configuration": written(trial.kernel, trial.configuration),
                    "seconds": trial.seconds if isfinite(trial.seconds) else None,
                }
                for trial in self.trials
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Result:
        """The result that `to_dict` wrote. Raises InputError, naming the key, for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"format: must be {FORMAT!r}; this is no result of attn profile-na --optimize")
        if data.get("version") != VERSION:
            raise InputError(f"version: takes {VERSION}, got {data.get('version')!r}")
        missing = sorted(KEYS - set(data))
        if missing:
            raise InputError(f"{', '.join(missing)}: missing")
        case, kernel = Case.from_dict(data["case"]), data["kernel"]
        problem = case.problem()

        def read(kernel: str, configuration: Any) -> Any:
            if not isinstance(configuration, dict):
                raise InputError(f"configuration: takes a mapping, got {configuration!r}")
            return (family_of(kernel, problem) or UNTUNABLE).read(configuration)

        trials = tuple(
            Trial(
                kernel=each["kernel"],
                direction=each["direction"],
                configuration=read(each["kernel"], each["configuration"]),
                seconds=float("inf") if each["seconds"] is None else each["seconds"],
            )
            for each in data["trials"]
        )
        backward = read(kernel, data["backward"]) if case.backward else None
        return cls(
            case=case,
            kernel=kernel,
            forward=read(kernel, data["forward"]),
            backward=backward,
            trials=trials,
            torch=data["torch"],
        )


def load(path: str | Path) -> Result:
    """A result that was saved.

    Raises InputError, naming the file, for one that is none, and OSError where it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return Result.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON: {error}") from error
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: {error if isinstance(error, InputError) else f'cannot be read: {error!r}'}"
        ) from error
