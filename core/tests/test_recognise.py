"""Operands are recognised when everything that a kernel depends on is the same, by torch's object and without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from attn_core.recognise import Recognise, recogniser
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(params=["torch's guard object", "comparison in Python"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "comparison in Python":
        monkeypatch.setattr("attn_core.recognise._guard", lambda tensors: None)
    return request.param


class Same(TorchDispatchMode):
    """Does what torch would have done."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def operand() -> torch.Tensor:
    return torch.ones(2, 3, 4, dtype=torch.complex64)


def test_others_that_look_the_same_are_recognised():
    recognise = recogniser([operand(), operand()])
    assert recognise(operand(), operand() * 2)


@pytest.mark.parametrize(
    "other",
    [
        lambda: operand().real.contiguous(),
        lambda: operand().to("meta"),
        lambda: operand().requires_grad_(),
        lambda: torch.ones(2, 3, 5, dtype=torch.complex64),
        lambda: torch.ones(2, 4, 3, dtype=torch.complex64).mT,
        lambda: operand().as_subclass(Subclass),
        lambda: operand().conj(),
    ],
    ids=["dtype", "device", "requires_grad", "shape", "strides", "class", "conjugate bit"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_another_operand_is_not(other: Callable[[], torch.Tensor], place: int):
    recognise = recogniser([operand(), operand()])
    given = [operand(), operand()]
    given[place] = other()
    assert not recognise(*given)


@pytest.mark.parametrize(
    "state",
    [lambda: torch.autocast("cpu"), torch.inference_mode, Same],
    ids=["autocast", "inference mode", "a dispatch mode"],
)
def test_the_same_operands_in_another_state_of_torch_are_not(state: Callable[[], AbstractContextManager[object]]):
    given = operand(), operand()
    recognise = recogniser(given)
    for within, expected in ((nullcontext, True), (state, False), (nullcontext, True)):
        with within():
            assert recognise(*given) is expected


def test_the_same_operands_inside_vmap_are_not():
    given = operand(), operand()
    recognise: Recognise = recogniser(given)
    seen = []
    torch.func.vmap(lambda _: seen.append(recognise(*given)) or torch.zeros(()))(torch.zeros(3))
    assert seen == [False]


def test_one_object_in_two_places_is_told_from_two():
    shared, other = operand(), operand()
    recognise = recogniser([shared, shared])
    assert recognise(other, other)
    assert not recognise(shared, other)
