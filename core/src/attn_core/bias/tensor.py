"""TensorBias: a dense bias, boolean or floating."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import AttnBias, Kind

# Looked up once: many build a bias for every call.
_BOOL = torch.bool


class TensorBias(Kind):
    """A dense tensor, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`.

    Boolean: True = may attend. Floating: added to the scaled logits; only -inf masks, `finfo.min` is a finite number.
    A gradient flows to a floating tensor that requires one. `bias` is another name of `tensor`.

    Raises InputTypeError for other dtypes, and, when bound, InputError for a shape that does not broadcast.
    """

    tensor: Tensor
    #: The class of the bias that materialized it, of those that are known by their methods alone.
    made_by: type[AttnBias] | None = None

    by_methods = False  # what it materializes is what it holds

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "by_methods" not in vars(cls) and "materialize" in vars(cls):
            cls.by_methods = True

    def __init__(self, bias: Tensor, lengths: tuple[int, int] | None = None) -> None:
        if not isinstance(bias, Tensor):
            raise InputTypeError(f"TensorBias: takes a tensor, got {type(bias).__name__}")
        dtype = bias.dtype
        if dtype is not _BOOL and not dtype.is_floating_point:
            raise InputTypeError(
                f"TensorBias: takes a boolean tensor (True = may attend) or a floating one (added to the logits),"
                f" got {dtype}"
            )
        object.__setattr__(self, "tensor", bias)
        if lengths is not None:  # which it is until bound
            object.__setattr__(self, "lengths", lengths)

    @property
    def bias(self) -> Tensor:
        return self.tensor

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; make a new one")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.tensor, self.lengths)

    def __repr__(self) -> str:
        grad = ", requires_grad" if self.tensor.requires_grad else ""
        name = str(self.tensor.dtype).removeprefix("torch.")
        by = f", from {self.made_by.__name__}.materialize" if self.made_by else ""
        return f"TensorBias({list(self.tensor.shape)} {name}{grad}{by})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, TensorBias)
        if self.tensor is other.tensor:
            return self.lengths == other.lengths
        return super().__eq__(other)

    __hash__ = AttnBias.__hash__

    @property
    def key(self) -> tuple[object, ...]:
        # Read at every call: somebody may call requires_grad_() on a table that is held for long.
        tensor = self.tensor
        return (
            TensorBias,
            type(tensor),
            tensor.shape,
            tensor.dtype,
            tensor.device,
            tensor.stride(),
            tensor.requires_grad,
            self.lengths,
        )

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        shape = (1, 1, 1, 1, *self.tensor.shape)
        return shape[-4], shape[-3]

    @property
    def holds_data(self) -> bool:
        return True

    @property
    def requires_grad(self) -> bool:
        return self.tensor.requires_grad

    @property
    def device(self) -> torch.device | None:
        return self.tensor.device

    def bind(self, seqlen_q: int, seqlen_kv: int) -> TensorBias:
        self._check_rebind(seqlen_q, seqlen_kv)
        shape = self.tensor.shape
        rows, columns = (1, 1, *shape)[-2:]
        if len(shape) > 4 or (rows != 1 and rows != seqlen_q) or (columns != 1 and columns != seqlen_kv):
            raise InputError(self._misfit(list(shape), seqlen_q, seqlen_kv))
        return self.at((seqlen_q, seqlen_kv))

    def at(self, lengths: tuple[int, int]) -> TensorBias:
        bias = object.__new__(TensorBias)  # what is held was checked when it came in
        object.__setattr__(bias, "tensor", self.tensor)
        object.__setattr__(bias, "lengths", lengths)
        return bias

    def facts(self) -> tuple[Any, ...]:
        shape = (1, 1, 1, 1, *self.tensor.shape)[-4:]
        # Branching on a symbolic size, not bool(), makes the answer a constant of the graph.
        single = tuple(True if size == 1 else False for size in shape)  # noqa: SIM210
        return self.tensor.dtype, self.tensor.requires_grad, single

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> TensorBias:
        dtype, requires_grad, single = facts
        shape = [1 if one else size for one, size in zip(single, (batch, num_heads, *lengths))]
        return cls(torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad), lengths)

    def held(self) -> dict[str, Tensor]:
        return {"tensor": self.tensor}

    def with_held(self, tensors: dict[str, Tensor]) -> TensorBias:
        return TensorBias(tensors.get("tensor", self.tensor), self.lengths)

    def needs_materialization(self) -> bool:
        return True

    @staticmethod
    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any,
        causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Raises NotImplementedError: `materialize` gives all there is."""
        raise NotImplementedError("TensorBias needs materialization, so its dispatch is never called")

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """The tensor itself, moved where `device` is another."""
        return self.tensor if device is None else self.tensor.to(device)

    def _misfit(self, shape: list[int], seqlen_q: int, seqlen_kv: int) -> str:
        wanted = f"[batch, num_heads, seqlen_q={seqlen_q}, seqlen_kv={seqlen_kv}]"
        text = f"bias: a tensor of shape {shape} does not broadcast to {wanted}"
        if self.made_by is not None:
            text = f"bias: {self.made_by.__name__}.materialize gave {shape}, which does not broadcast to {wanted}"
        if len(shape) > 4:
            return f"{text}: it has {len(shape)} dimensions"
        axes = zip(("seqlen_q", "seqlen_kv"), (1, 1, *shape)[-2:], (seqlen_q, seqlen_kv))
        return f"{text}: {', '.join(f'{axis} is {got}' for axis, got, want in axes if got not in (1, want))}"
