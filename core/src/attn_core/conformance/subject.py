"""The kernel that is being checked, and how checks run it: by itself, with no adaptation between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..capabilities import Backward, Capabilities
from ..errors import InputError, suggestion
from ..functional import attention
from ..kernel import Kernel
from ..problem import Problem
from ..registry import registry
from ..scope import allow
from ..testing.differences import Call
from ..testing.problems import Inputs
from .cases import Case, base_problem, claimed_cases
from .results import NotTestable

SEED = 20261121
#: The types of devices that come with torch and hold numbers.
DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")


@dataclass(frozen=True)
class Subject:
    """A registered kernel, on one device type."""

    kernel: Kernel
    device: str

    @property
    def name(self) -> str:
        return self.kernel.name

    @cached_property
    def declared(self) -> Capabilities:
        """The record that counts on this device."""
        for capabilities in self.kernel.declarations:
            if self.device in capabilities.devices or "*" in capabilities.devices:
                problem = base_problem(capabilities, self.device)
                if capabilities.fits_compute_capability(problem):
                    return capabilities
        raise NotTestable(f"it declares nothing for {self.device}, or not for this one")

    @property
    def backward(self) -> Backward | None:
        backward = self.declared.backward
        return backward if isinstance(backward, Backward) else None

    @cached_property
    def base(self) -> Problem:
        """A plain problem that it claims to take."""
        return base_problem(self.declared, self.device)

    @cached_property
    def claimed(self) -> list[Case]:
        """Cases that its declaration covers."""
        return claimed_cases(self.kernel, self.device)

    @cached_property
    def taken(self) -> list[Case]:
        """Those of them that its own limits leave."""
        return [case for case in self.claimed if not self.kernel.refusals(case.problem)]

    def takes(self, problem: Problem) -> bool:
        return not self.kernel.refusals(problem)

    def run(self, inputs: Inputs, **more: Any) -> Any:
        """The kernel's result for these operands. Fails where an adaptation or another kernel would come between."""
        return attention(
            inputs.query, inputs.key, inputs.value, inputs.bias, kernel=self.name, **(inputs.options | more)
        )

    @property
    def call(self) -> Call:
        return self.run

    def out(self, inputs: Inputs) -> Tensor:
        """The output alone."""
        result = self.run(inputs)
        out = result[0] if isinstance(result, tuple) else result
        assert isinstance(out, Tensor)
        return out

    def must_take(self, case: Case) -> None:
        """Raises NotTestable where its own limits refuse the case."""
        refusals = self.kernel.refusals(case.problem)
        if refusals:
            raise NotTestable(f"its own limits refuse it: {'; '.join(map(str, refusals))}")


def must_be_a_type(device: str) -> None:
    """Raises InputError unless it is a type of device that holds numbers."""
    try:
        known = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        near = suggestion(str(device), DEVICE_TYPES)
        raise InputError(f"device: takes a type of device, such as 'cpu' or 'cuda', got {device!r}.{near}") from error
    if device != known or known == "meta":
        why = "it holds no numbers" if known == "meta" else f"give {known!r} alone"
        raise InputError(f"device: nothing can be checked on {device!r}: {why}")


def must_be_here(device: str) -> None:
    """Raises InputError unless this machine has a device of that type: else every row would fail, and say nothing."""
    must_be_a_type(device)
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises what it likes
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"device: nothing can be checked on {device!r} here: {reason}") from error


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, `torch.use_deterministic_algorithms(on)`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def registered(kernel: Kernel) -> Iterator[Kernel]:
    """Within it, the kernel is in the registry; one that is there already stays."""
    if any(other is kernel for other in registry.kernels()):
        yield kernel
        return
    with registry.register(kernel):
        yield kernel


def allowed(kernel: Kernel) -> AbstractContextManager[Any]:
    """Within it, the kernel may run where it is approximate, too: it is held to its class."""
    approximate = any(each.numerics == "approximate" for each in kernel.declarations)
    return allow("approximate") if approximate else nullcontext()
