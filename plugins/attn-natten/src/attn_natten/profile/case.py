"""What is profiled: one fused neighborhood attention, without data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import prod
from typing import Any

import torch
from attn_core import Neighborhood, Problem
from attn_core.dispatch import ATTENTION, asked
from attn_core.door import compute_capability
from attn_core.errors import InputError
from torch import Tensor

from ..arguments import neighborhood
from ..autotuner.search import Asked, described
from ..flops.counted import macs, macs_of_backward

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, parameters, dtype and device of a fused call.

    `spatial`, `kernel_size`, `stride`, `dilation` and `is_causal` have a value on each of 1 to 3 axes; `additional` are
    keys and values that every query sees beside its window; with `backward`, gradients are wanted.

    Raises InputError or ConstraintError for what is no such call.
    """

    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False
    additional: int = 0

    def __post_init__(self) -> None:
        self.neighborhood()
        for name, least in (
            ("batch", 1),
            ("num_heads", 1),
            ("num_kv_heads", 1),
            ("head_dim", 1),
            ("head_dim_v", 1),
            ("additional", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name}: takes an int >= {least}, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_kv_heads: must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: takes {', '.join(DTYPES)}, got {self.dtype!r}")
        if type(self.backward) is not bool:
            raise InputError(f"backward: takes True or False, got {self.backward!r}")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device: takes a device of torch, got {self.device!r}") from error

    @property
    def rank(self) -> int:
        return len(self.spatial)

    def neighborhood(self) -> Neighborhood:
        """What a query sees, beside the additional keys."""
        return neighborhood(
            self.spatial, self.kernel_size, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal
        )

    def problem(self) -> Problem:
        """The neighborhood's part as the kernels see it; the device need not be there."""

        def operand(heads: int, dim: int) -> Tensor:
            shape = (self.batch, prod(self.spatial), heads, dim)
            return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta", requires_grad=self.backward)

        operands = (
            operand(self.num_heads, self.head_dim),
            operand(self.num_kv_heads, self.head_dim),
            operand(self.num_kv_heads, self.head_dim_v),
        )
        problem = asked(ATTENTION, *operands, self.neighborhood(), None, None, 0.0, self.additional > 0)
        device = torch.device(self.device)
        capability = compute_capability(None) if device.type == "cuda" else None
        return replace(problem, device=device.type, compute_capability=capability)

    def asked(self) -> Asked:
        """The same as a problem of the autotuner."""
        shape = torch.Size((self.batch, *self.spatial, self.num_heads, self.head_dim))
        return described(
            shape,
            self.num_kv_heads,
            self.head_dim_v,
            torch.device(self.device),
            DTYPES[self.dtype],
            self.neighborhood(),
        )

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(query, key, value, additional keys, additional values) of random numbers, heads-last."""
        device = torch.device(self.device)
        generator = torch.Generator(device).manual_seed(0)

        def fresh(tokens: tuple[int, ...], heads: int, dim: int) -> Tensor:
            made = torch.randn(self.batch, *tokens, heads, dim, generator=generator, device=device)
            return made.to(DTYPES[self.dtype]).requires_grad_(self.backward)

        query = fresh(self.spatial, self.num_heads, self.head_dim)
        key = fresh(self.spatial, self.num_kv_heads, self.head_dim)
        value = fresh(self.spatial, self.num_kv_heads, self.head_dim_v)
        if not self.additional:
            return query, key, value, None, None
        more = (self.additional,)
        keys, values = fresh(more, self.num_kv_heads, self.head_dim), fresh(more, self.num_kv_heads, self.head_dim_v)
        return query, key, value, keys, values

    def flops(self, *, backward: bool) -> int:
        """Of the forward, or the backward, by formula."""
        query = (self.batch, *self.spatial, self.num_heads, self.head_dim)
        more = (self.batch, self.additional) if self.additional else None
        return 2 * (macs_of_backward if backward else macs)(query, (self.head_dim_v,), more, self.kernel_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> Case:
        """The case that `to_dict` wrote. Raises InputError, naming the field, for anything else."""
        if not isinstance(data, dict):
            raise InputError(f"case: takes a mapping, got {type(data).__name__}")
        known = {field.name for field in fields(cls)}
        odd = sorted(set(data) - known)
        missing = sorted({"spatial", "kernel_size", "stride", "dilation", "is_causal"} - set(data))
        if odd or missing:
            raise InputError(f"case: has {', '.join(sorted(known))}; unknown: {odd}, missing: {missing}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def __str__(self) -> str:
        def shown(values: tuple[Any, ...]) -> str:
            return "x".join(map(str, values))

        parts = [f"na{self.rank}d of {self.batch} x {shown(self.spatial)}", f"window {shown(self.kernel_size)}"]
        for name, values, plain in (("stride", self.stride, 1), ("dilation", self.dilation, 1)):
            if set(values) != {plain}:
                parts.append(f"{name} {shown(values)}")
        if any(self.is_causal):
            parts.append(f"causal {shown(self.is_causal)}")
        heads = f"{self.num_heads}" if self.num_kv_heads == self.num_heads else f"{self.num_heads}:{self.num_kv_heads}"
        dim = f"{self.head_dim}" if self.head_dim_v == self.head_dim else f"{self.head_dim}:{self.head_dim_v}"
        parts += [f"heads {heads}", f"head_dim {dim}", self.dtype, self.device]
        if self.additional:
            parts.append(f"{self.additional} additional")
        if self.backward:
            parts.append("forward and backward")
        return ", ".join(parts)
