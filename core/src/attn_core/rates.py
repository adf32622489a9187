"""Rates: what adaptations take on one kind of device, beside the kernel itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .bias import AttnBias
from .cost import Terms


@dataclass(frozen=True, kw_only=True)
class Written:
    """Seconds of writing out a bias as a tensor."""

    call: float  #: fixed
    element: float  #: per element of the tensor


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of what is done to operands and biases before a kernel runs."""

    call: float  #: per operation that is added
    copy: float  #: per element that is copied
    written: Mapping[str, Written] = field(default_factory=dict)  #: by kind of bias, "*" for every other
    threads: int | None = None  #: of the CPU when they were measured; with others, all but what is fixed scales
    source: str = "prior"  #: "prior", or on what they were measured

    def copying(self, elements: Terms) -> Terms:
        """So many elements copied."""
        return elements.times(self.copy * self._of_threads()).plus(Terms(call=self.call))

    def writing(self, bias: AttnBias, elements: Terms) -> Terms:
        """The bias written out as so many elements."""
        rate = self.of_kind(bias)
        return elements.times(rate.element * self._of_threads()).plus(Terms(call=rate.call))

    def of_kind(self, bias: AttnBias) -> Written:
        """The rate of this bias: of each of its parts, where it is made of others, and of each of its axes."""
        own = self.written.get(type(bias).__name__) or self.written.get("*")
        if own is None:
            own = Written(call=self.call, element=self.copy)
        parts = getattr(bias, "parts", ())
        if isinstance(parts, tuple) and parts and all(isinstance(part, AttnBias) for part in parts):
            rates = [self.of_kind(part) for part in parts]
            return Written(
                call=sum(rate.call for rate in rates), element=sum(rate.element + self.copy for rate in rates)
            )
        axes = getattr(bias, "axes", None) or getattr(bias, "extents", None)
        count = len(axes) if isinstance(axes, tuple) else 1
        return Written(call=own.call * count, element=own.element * count)

    def _of_threads(self) -> float:
        return self.threads / torch.get_num_threads() if self.threads else 1.0


#: By type of device, "*" for every other.
SHIPPED: Mapping[str, Rates] = {
    "cpu": Rates(
        call=8.7e-06,
        copy=2.78e-10,
        written={
            "Causal": Written(call=4.71e-05, element=6.69e-10),
            "Window": Written(call=5.75e-05, element=2.15e-09),
            "Neighborhood": Written(call=0.000157, element=1.5e-09),
            "Segments": Written(call=0.000142, element=1.49e-09),
            "ALiBi": Written(call=0.0001, element=3.2e-09),
            "RelPosTable": Written(call=0.00015, element=9e-09),
            "*": Written(call=0.000101, element=1.45e-09),
        },
        threads=1,
        source="AMD EPYC, 1 thread",
    ),
    "cuda": Rates(call=5e-6, copy=4e-12),
    "*": Rates(call=5e-6, copy=1e-9),
}


def shipped_rates(device: str) -> Rates:
    return SHIPPED.get(device) or SHIPPED["*"]
