"""Problems that real models ask: recorded from timm, transformers and diffusers, with where each came from.

    for recorded in recorded_problems():
        print(recorded.origin, recorded.problem)

What a file written by hand would leave out is here as models have it: odd lengths (197, 49, 577), windows as batch,
tables as biases with a gradient, masks of one row, decoding steps. The file was written by
`benchmarks/recording/record_problems.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any, Literal

import torch

from ..bias import AttnBias, Causal, Intersection, KeyPadding, TensorBias, Window
from ..problem import Problem

#: What a problem takes from the file as it is; the rest has its default there, or is told below.
_SIZES = ("batch", "seqlen_q", "seqlen_kv", "num_heads", "num_kv_heads", "head_dim", "head_dim_v")
_OPTIONS = ("scale", "softcap", "dropout_p", "requires_grad", "bias_requires_grad", "strided_head_dim")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A problem, and the module that asked it."""

    problem: Problem  #: its device is "cpu"; the tensors of its bias are on the meta device
    library: str
    version: str  #: of that library
    model: str
    module: str  #: the first of the model that asked it, with its class
    mode: str  #: "forward", "prefill", "decode" or "train", some with how the input differs: "prefill, padded"
    form: Literal["passed", "meant"]  #: "meant": the model passed a tensor, and said that it is this bias
    also: tuple[str, ...] = ()  #: other models that ask the same

    @property
    def origin(self) -> str:
        """Where it came from, for people."""
        return f"{self.library} {self.version}, {self.model}, {self.module}, {self.mode}"

    @property
    def kind(self) -> str:
        """The kind of bias: "no bias", "Causal", "TensorBias bool", "Intersection", …; "gqa" and "softcap" besides."""
        bias, problem = self.problem.bias, self.problem
        name = "no bias" if bias is None else type(bias).__name__
        if isinstance(bias, TensorBias):
            name += " bool" if bias.tensor.dtype is torch.bool else " trained" if bias.requires_grad else " float"
        gqa = ", gqa" if problem.num_heads != problem.num_kv_heads else ""
        return f"{name}{gqa}{', softcap' if problem.softcap is not None else ''}"


def recorded_problems() -> list[Recorded]:
    """All of them, in the order in which they were recorded; each problem is there once."""
    text = files(__package__).joinpath("recorded.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return [_read(row, data["libraries"][row["library"]]) for row in data["problems"]]


def evenly(recorded: Iterable[Recorded], number: int) -> list[Recorded]:
    """At most `number` of them: from each library and each kind in turn, and within these from the whole length."""
    libraries: dict[str, dict[str, list[Recorded]]] = {}
    for each in recorded:
        libraries.setdefault(each.library, {}).setdefault(each.kind, []).append(each)
    found = []
    for library, share in _shares({name: sum(map(len, of.values())) for name, of in libraries.items()}, number).items():
        kinds = libraries[library]
        for kind, few in _shares({name: len(of) for name, of in kinds.items()}, share).items():
            found += [kinds[kind][i * len(kinds[kind]) // few] for i in range(few)]
    return found


def _shares(sizes: dict[str, int], number: int) -> dict[str, int]:
    """How many of each size to take, one after the other, until there are `number` or no more."""
    shares = dict.fromkeys(sizes, 0)
    while growing := [name for name, share in shares.items() if share < sizes[name]][: number - sum(shares.values())]:
        for name in growing:
            shares[name] += 1
    return shares


def described(problem: Problem) -> dict[str, Any]:
    """A problem as plain data, as it is in the file. Raises TypeError for a bias of a kind that is not recorded."""
    data: dict[str, Any] = {name: getattr(problem, name) for name in _SIZES}
    data["dtype"] = str(problem.dtype).removeprefix("torch.")
    if problem.bias is not None:
        data["bias"] = _bias_data(problem.bias)
    defaults = {field.name: field.default for field in fields(Problem)}
    return data | {name: getattr(problem, name) for name in _OPTIONS if getattr(problem, name) != defaults[name]}


def _read(row: dict[str, Any], version: str) -> Recorded:
    lengths = row["seqlen_q"], row["seqlen_kv"]
    problem = Problem(
        **{name: row[name] for name in _SIZES},
        **{name: row[name] for name in _OPTIONS if name in row},
        dtype=getattr(torch, row["dtype"]),
        device="cpu",
    )
    if "bias" in row:
        bias = _bias(row["bias"], problem.batch).bind(*lengths).normalize()
        problem = replace(problem, bias=None if bias is None else bias.without_data())
    origin = {name: row[name] for name in ("library", "model", "module", "mode", "form")}
    return Recorded(problem=problem, version=version, also=tuple(row.get("also", ())), **origin)


def _bias_data(bias: AttnBias) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": type(bias).__name__}
    if isinstance(bias, TensorBias):
        tensor = bias.tensor
        data |= {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        return data | ({"requires_grad": True} if tensor.requires_grad else {})
    if isinstance(bias, Intersection):
        return data | {"parts": [_bias_data(part) for part in bias.parts]}
    if isinstance(bias, KeyPadding):
        return data
    if isinstance(bias, Window):
        return data | {"left": bias.left, "right": bias.right, "corner": bias.corner}
    if isinstance(bias, Causal):
        return data | {"corner": bias.corner}
    raise TypeError(f"described: no rule for a {type(bias).__name__}")


def _bias(data: dict[str, Any], batch: int) -> AttnBias:
    kind = data["kind"]
    if kind == "TensorBias":
        dtype, grad = getattr(torch, data["dtype"]), data.get("requires_grad", False)
        return TensorBias(torch.empty(data["shape"], dtype=dtype, device="meta", requires_grad=grad))
    if kind == "Intersection":
        first, *others = (_bias(part, batch) for part in data["parts"])
        for other in others:
            first = first & other  # type: ignore[operator]
        return first
    if kind == "KeyPadding":
        return KeyPadding(torch.empty(batch, dtype=torch.int64, device="meta"))
    if kind == "Window":
        return Window(data["left"], data["right"], data["corner"])
    return Causal(data["corner"])
