"""What was measured of a model: one row for each way to run it and each kind of step, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: Ways to run a model that are no kernel's.
EAGER, STOCK, AGAIN, ATTN = "eager", "stock", "stock again", "attn"
#: Kinds of steps.
FORWARD, TRAIN = "forward", "train"

State = Literal["ran", "refused", "unavailable", "failed"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest absolute difference to eager, of outputs or of gradients.

    `largest` is the largest entry that eager has there; `where` names the parameter whose gradient it is.
    """

    value: float
    largest: float
    where: str = ""


@dataclass(kw_only=True)
class Row:
    """A model, run in one way: "eager" and "stock" as its library does, "attn" as attn chooses, else by that kernel.

    `state`: "ran"; or "refused" (it does not take a call of this model), "unavailable" (not on this machine), "failed"
    (it raised), each with its `reason`, and then nothing was measured. What is None was not measured.
    """

    by: str
    step: str  #: "forward" or "train", which is forward and backward
    state: State = "ran"
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)  #: of attention in one step, by the kernel that ran them
    seconds: list[float] = field(default_factory=list)  #: of a step, one figure per round
    seconds_median: float | None = None
    of_stock: float | None = None  #: the median of this time by stock's, round by round: below 1 is faster
    peak_bytes: int | None = None  #: most that a step had allocated at once beyond the weights and inputs
    outputs: Difference | None = None
    gradients: Difference | None = None


@dataclass(kw_only=True)
class Measured:
    """Everything about one model."""

    model: str
    host: str
    host_version: str
    inputs: str
    parameters: int
    dtype: str
    device: str
    seed: int
    left_alone: list[str] = field(default_factory=list)  #: modules whose attention is never attn's, and why
    memory: str = ""  #: how the memory was measured, or why it was not
    rows: list[Row] = field(default_factory=list)

    def row(self, by: str, step: str = FORWARD) -> Row:
        """The row of that name. Raises KeyError."""
        for row in self.rows:
            if (row.by, row.step) == (by, step):
                return row
        raise KeyError((by, step))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN and no infinity: these are text."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
