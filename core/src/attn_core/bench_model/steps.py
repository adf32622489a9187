"""One step of a model, its outcome, and how far two outcomes are apart.

A step without chance: every dropout is off, in training, too. Else each kernel would drop other weights, and nothing
could be compared. For the same reason, layers that begin as nothing (a table of zeros, a scale of 1e-5) get other
weights: they would hide what they are multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .built import SEED, BuiltModel
from .results import TRAIN, Difference

#: Of a parameter that begins smaller than this everywhere, with one value: it is drawn or raised anew.
NOTHING = 0.2
RAISED = 0.5
STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outputs of a step, on the CPU, and the gradient of every parameter that has one."""

    outputs: list[Tensor]
    gradients: Mapping[str, Tensor]


def prepare(model: nn.Module, seed: int = SEED) -> None:
    """Takes chance out of the model, and the cache; gives weights to what begins as nothing."""
    for module in model.modules():
        _without_chance(module, "Drop" in type(module).__name__)
    config = getattr(model, "config", None)
    for each in (config, *vars(config).values()) if config is not None else ():
        if hasattr(each, "__dict__"):
            _without_chance(each, False)
        if getattr(each, "use_cache", False) is True:  # keys and values that nobody asks for again
            each.use_cache = False
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            first = parameter.reshape(-1)[0].item() if parameter.numel() else 1.0
            if abs(first) >= NOTHING or not bool((parameter == first).all()):
                continue
            if first:
                parameter.fill_(RAISED)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)


def _without_chance(owner: Any, is_dropout: bool) -> None:
    for name, value in list(vars(owner).items()):
        chance = "drop" in name.lower() or (is_dropout and name in ("p", "prob"))
        if chance and isinstance(value, float) and value:
            setattr(owner, name, 0.0)


def step_of(built: BuiltModel, kind: str) -> Callable[[], list[Tensor]]:
    """A function that does one step and returns the floating outputs; of "train", the gradients are in the model."""
    if kind != TRAIN:
        built.model.eval()

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _floating(built())

        return forward

    built.model.train()
    weights: list[Tensor] = []

    def train() -> list[Tensor]:
        built.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            outputs = _floating(built())
            if not weights:
                weights.extend(_weights(outputs))
            loss = sum(
                ((out * weight).sum() for out, weight in zip(outputs, weights, strict=True) if out.requires_grad)
            )
            loss.backward()  # type: ignore[union-attr]
        return outputs

    return train


def _weights(outputs: Iterable[Tensor]) -> list[Tensor]:
    """What the loss weighs each output by: every entry differently, so that no gradient cancels."""
    generator = torch.Generator().manual_seed(SEED)
    return [(torch.randn(x.shape, generator=generator) / math.sqrt(max(x.numel(), 1))).to(x) for x in outputs]


def outcome(built: BuiltModel, step: Callable[[], list[Tensor]]) -> Outcome:
    """Does the step and copies what came out; the model has no gradients afterwards."""
    torch.manual_seed(SEED)
    outputs = [out.detach().cpu().clone() for out in step()]
    gradients = {
        name: parameter.grad.cpu().clone()
        for name, parameter in built.model.named_parameters()
        if parameter.grad is not None
    }
    built.model.zero_grad(set_to_none=True)
    return Outcome(outputs=outputs, gradients=gradients)


def output_difference(ours: Outcome, eager: Outcome) -> Difference:
    """Of all outputs."""
    return _largest({str(number): out for number, out in enumerate(ours.outputs)}, dict(_named(eager)), named=False)


def gradient_difference(ours: Outcome, eager: Outcome) -> Difference | None:
    """Of all gradients of parameters; None where the step has none."""
    return _largest(ours.gradients, eager.gradients) if eager.gradients else None


def _named(eager: Outcome) -> Iterable[tuple[str, Tensor]]:
    return ((str(number), out) for number, out in enumerate(eager.outputs))


def _largest(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], named: bool = True) -> Difference:
    """The largest difference; infinite where one has a tensor that the other lacks, NaN where there is one."""
    if ours.keys() != eager.keys():
        odd = sorted(ours.keys() ^ eager.keys())[0]
        return Difference(value=math.inf, largest=_size(eager.values()), where=odd)
    value, where = 0.0, ""
    for name, theirs in eager.items():
        mine = ours[name]
        if mine.shape != theirs.shape:
            return Difference(value=math.inf, largest=_size(eager.values()), where=name)
        difference = _size([mine.double() - theirs.double()])
        if math.isnan(difference) or difference > value:
            value, where = difference, name
        if math.isnan(value):
            break
    return Difference(value=value, largest=_size(eager.values()), where=where if named else "")


def _size(tensors: Iterable[Tensor]) -> float:
    """The largest absolute entry; NaN where there is one."""
    sizes = [tensor.abs().max().item() for tensor in tensors if tensor.numel()]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)


def _floating(output: Any) -> list[Tensor]:
    """The floating tensors of what a model returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    return [x for each in output for x in _floating(each)] if isinstance(output, Iterable) else []
