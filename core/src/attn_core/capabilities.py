"""Capabilities: what a kernel can do, declared once and used everywhere.

Closed by default: what is not declared is not supported. The same record drives the choice, the reasons of a refusal,
the command line's tables and the tests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from inspect import isabstract
from typing import Literal

import torch

from .bias import AttnBias, Paged, Sum, TensorBias
from .errors import DeclarationError
from .problem import Problem

ANY_DEVICE = frozenset({"*"})
ANY_DIM = range(1, 1 << 16)

BiasKind = type[AttnBias] | AttnBias


@dataclass(frozen=True)
class Refusal:
    """One reason why a kernel does not take a problem, and the field that it concerns."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What a kernel's backward can do; None means "as the forward"."""

    dtypes: Collection[torch.dtype] | None = None
    head_dims: Collection[int] | None = None
    head_dims_v: Collection[int] | None = None  #: of those that differ from head_dim; empty: it must be equal
    biases: Collection[BiasKind] | None = None
    gqa: bool | None = None
    bias_grad: bool = False  #: gives the gradient of a floating TensorBias, and of what else is held by biases it takes
    lse_grad: bool = False  #: differentiates through the LSE that it returns
    deterministic: bool = False
    double: bool = False  #: differentiable twice
    min_compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel can do. No bias at all is always included; everything else is off until named.

    Args:
        devices: device types, such as {"cpu", "cuda"}; {"*"} is any.
        dtypes: of query, key and value, which always agree.
        head_dims: sizes of query's and key's last dimension: a range or a set.
        head_dims_v: sizes of value's where it may differ from head_dim; None: it must be equal.
        biases: kinds, or values where only part of a kind is supported: {Causal} both corners,
            {Causal("bottom-right")} that one. A kind that has padding (KeyPadding) is a promise to never read it; with
            Paged, alone or as a part, `run` is given the pages as they lie, and reads those of the table.
        backward: what the backward can do; True: the same as the forward; None or False: there is none.
        gqa: num_kv_heads may divide num_heads.
        softcap, dropout, return_lse: `run` takes the argument of that name.
        deterministic: two runs of the forward are bit-equal.
        batch_invariant: a batch entry's result does not depend on the others.
        forward_ad: `torch.func.jvp` works through it.
        compile: may be traced by torch.compile and torch.export.
        strided_head_dim: a last dimension may be strided.
        empty_lengths: seqlen_q, seqlen_kv or batch may be 0.
        min_compute_capability, max_compute_capability: of CUDA devices, inclusive, such as (8, 0); None: no limit.
        numerics: "exact", or "approximate" for int8, fp8 and the like, used only where the caller allows it.

    Raises DeclarationError for values that cannot be a declaration.
    """

    devices: Collection[str]
    dtypes: Collection[torch.dtype]
    head_dims: Collection[int]
    head_dims_v: Collection[int] | None = None
    biases: Collection[BiasKind] = ()
    backward: Backward | bool | None = None
    gqa: bool = False
    softcap: bool = False
    dropout: bool = False
    return_lse: bool = False
    deterministic: bool = False
    batch_invariant: bool = False
    forward_ad: bool = False
    compile: bool = False
    strided_head_dim: bool = False
    empty_lengths: bool = False
    min_compute_capability: tuple[int, int] | None = None
    max_compute_capability: tuple[int, int] | None = None
    numerics: Literal["exact", "approximate"] = "exact"

    def __post_init__(self) -> None:
        for field in ("devices", "dtypes", "head_dims"):
            value = getattr(self, field)
            if isinstance(value, str) or not isinstance(value, Collection):
                raise DeclarationError(f"capabilities: {field} must be a set (or, for sizes, a range), got {value!r}")
        for bias in self.biases:
            if not isinstance(bias, AttnBias) and not (isinstance(bias, type) and issubclass(bias, AttnBias)):
                raise DeclarationError(f"capabilities: biases holds kinds or values of AttnBias, got {bias!r}")
        if self.numerics not in ("exact", "approximate"):
            raise DeclarationError(f'capabilities: numerics must be "exact" or "approximate", got {self.numerics!r}')
        if isinstance(self.backward, bool):
            object.__setattr__(self, "backward", Backward(deterministic=self.deterministic) if self.backward else None)

    def names_device(self, problem: Problem) -> bool:
        """Whether this record speaks of the problem's device type."""
        return problem.device in self.devices or "*" in self.devices

    def fits_compute_capability(self, problem: Problem) -> bool:
        """Whether the problem's device lies within this record's limits; true for all but CUDA devices."""
        return not problem.is_cuda or not self._refusals_of_compute_capability(problem)

    def refusals(self, problem: Problem) -> list[Refusal]:
        """Every reason why this declaration does not cover `problem`; empty where it does."""
        found: list[Refusal] = []

        def refuse(field: str, accepted: str, got: object) -> None:
            found.append(Refusal(field, f"takes {accepted}, got {got}"))

        if "*" not in self.devices and problem.device not in self.devices:
            refuse("device", _listed(self.devices), problem.device)
        elif problem.is_cuda:
            found += self._refusals_of_compute_capability(problem)
        if problem.dtype not in self.dtypes:
            refuse("dtype", _listed(self.dtypes), _name(problem.dtype))
        if problem.head_dim not in self.head_dims:
            refuse("head_dim", _sizes(self.head_dims), problem.head_dim)
        if problem.head_dim_v != problem.head_dim:
            if self.head_dims_v is None:
                refuse("head_dim_v", f"head_dim_v equal to head_dim={problem.head_dim}", problem.head_dim_v)
            elif problem.head_dim_v not in self.head_dims_v:
                refuse("head_dim_v", _sizes(self.head_dims_v), problem.head_dim_v)
        if problem.bias is not None and not covers(self.biases, problem.bias):
            refuse("bias", _listed_biases(self.biases), repr(problem.bias))
        if problem.num_kv_heads != problem.num_heads and not self.gqa:
            refuse("num_kv_heads", f"num_kv_heads equal to num_heads={problem.num_heads}", problem.num_kv_heads)
        if problem.softcap is not None and not self.softcap:
            refuse("softcap", "no softcap", f"{problem.softcap:g}")
        if problem.dropout_p and not self.dropout:
            refuse("dropout_p", "no dropout", f"{problem.dropout_p:g}")
        if problem.return_lse and not self.return_lse:
            found.append(Refusal("return_lse", "does not return the LSE"))
        if problem.deterministic and not self.deterministic:
            found.append(Refusal("deterministic", "is not deterministic, and torch.use_deterministic_algorithms is on"))
        if problem.forward_ad and not self.forward_ad:
            found.append(Refusal("forward_ad", "has no forward-mode derivative"))
        if problem.compiling and not self.compile:
            found.append(Refusal("compiling", "cannot be traced into a graph"))
        if problem.strided_head_dim and not self.strided_head_dim:
            found.append(Refusal("strided_head_dim", "takes contiguous last dimensions only"))
        if not self.empty_lengths and (problem.batch == 0 or problem.seqlen_q == 0 or problem.seqlen_kv == 0):
            got = f"batch={problem.batch}, seqlen_q={problem.seqlen_q}, seqlen_kv={problem.seqlen_kv}"
            refuse("empty_lengths", "at least one batch entry, query and key", got)
        if problem.needs_backward:
            found += self._refusals_of_backward(problem)
        return found

    def _refusals_of_compute_capability(self, problem: Problem) -> list[Refusal]:
        low, high, got = self.min_compute_capability, self.max_compute_capability, problem.compute_capability
        if low is None and high is None:
            return []
        if got is None:
            return [Refusal("compute_capability", "has limits, and the device's compute capability is unknown here")]
        if low is not None and got < low:
            return [Refusal("compute_capability", f"takes sm_{low[0]}{low[1]} or newer, got sm_{got[0]}{got[1]}")]
        if high is not None and got > high:
            text = f"is known to work up to sm_{high[0]}{high[1]}; sm_{got[0]}{got[1]} is newer than known"
            return [Refusal("compute_capability", text)]
        return []

    def _refusals_of_backward(self, problem: Problem) -> list[Refusal]:
        backward = self.backward
        if not isinstance(backward, Backward):
            return [Refusal("backward", "has no backward, and a gradient is needed")]
        found: list[Refusal] = []
        if backward.dtypes is not None and problem.dtype not in backward.dtypes:
            found.append(
                Refusal(
                    "backward.dtypes", f"takes {_listed(backward.dtypes)} in the backward, got {_name(problem.dtype)}"
                )
            )
        if backward.head_dims is not None and problem.head_dim not in backward.head_dims:
            text = f"takes {_sizes(backward.head_dims)} in the backward, got {problem.head_dim}"
            found.append(Refusal("backward.head_dims", text))
        sizes_v, dim_v = backward.head_dims_v, problem.head_dim_v
        if sizes_v is not None and dim_v != problem.head_dim and dim_v not in sizes_v:
            accepted = _sizes(sizes_v) if sizes_v else f"head_dim_v equal to head_dim={problem.head_dim}"
            found.append(Refusal("backward.head_dims_v", f"takes {accepted} in the backward, got {dim_v}"))
        if backward.biases is not None and problem.bias is not None and not covers(backward.biases, problem.bias):
            text = f"takes {_listed_biases(backward.biases)} in the backward, got {problem.bias!r}"
            found.append(Refusal("backward.biases", text))
        if backward.gqa is False and problem.num_kv_heads != problem.num_heads:
            text = f"takes num_kv_heads equal to num_heads={problem.num_heads} in the backward"
            found.append(Refusal("backward.gqa", f"{text}, got {problem.num_kv_heads}"))
        if problem.bias_requires_grad and not backward.bias_grad:
            found.append(Refusal("bias_grad", "gives no gradient to the bias, and one is needed"))
        if problem.return_lse and not backward.lse_grad:
            found.append(Refusal("lse_grad", "does not differentiate through the LSE, and a gradient is needed"))
        if problem.deterministic and not backward.deterministic:
            text = "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
            found.append(Refusal("backward.deterministic", text))
        low, got = backward.min_compute_capability, problem.compute_capability
        if problem.is_cuda and low is not None and (got is None or got < low):
            have = "unknown" if got is None else f"sm_{got[0]}{got[1]}"
            text = f"takes sm_{low[0]}{low[1]} or newer in the backward, got {have}"
            found.append(Refusal("backward.min_compute_capability", text))
        return found


def covers(biases: Iterable[BiasKind], bias: AttnBias) -> bool:
    """Whether a declaration names `bias` (bound): its kind, or a value that means the same at these lengths.

    A kind is matched exactly, since a subclass may mean something else. An abstract one (`Mask`, `AttnBias`) covers
    whatever derives from it, but not kinds with padding: never to read that is a promise made by name. `Sum` stands
    for sums of what else is named. Where a part is Paged, that must be named too: key and value are pages then.
    """
    if bias.paged is not None and Paged not in biases:
        return False
    if type(bias) is Sum:
        return Sum in biases and all(covers(biases, part) for part in bias.parts)
    for declared in biases:
        if isinstance(declared, type):
            if type(bias) is declared:
                return True
            if isabstract(declared) and isinstance(bias, declared) and not bias.has_padding:
                return True
        elif type(declared) is type(bias) and declared.bind(*bias.bound_lengths()).normalize() == bias:
            return True
    return False


def takes_dense_mask(capabilities: Capabilities) -> bool:
    """Whether the kernel takes a tensor for a bias, so that others can be written out for it."""
    return TensorBias in capabilities.biases or AttnBias in capabilities.biases


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(_name(v) if isinstance(v, torch.dtype) else str(v) for v in values)) or "none"


def _listed_biases(biases: Iterable[BiasKind]) -> str:
    return ", ".join(sorted(b.__name__ if isinstance(b, type) else repr(b) for b in biases)) or "no bias"


def _sizes(sizes: Collection[int]) -> str:
    if isinstance(sizes, range):
        if sizes.stop >= ANY_DIM.stop:
            return f"{sizes.start} and more" if sizes.step == 1 else f"multiples of {sizes.step}"
        if sizes.step == 1:
            return f"{sizes.start} to {sizes[-1]}"
        if sizes.start == sizes.step:
            return f"multiples of {sizes.step} up to {sizes[-1]}"
        return f"{sizes.start} to {sizes[-1]} in steps of {sizes.step}"
    return ", ".join(map(str, sorted(sizes)))
