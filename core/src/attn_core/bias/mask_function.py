"""MaskMod: a mask by a function of the user's, with FlexAttention's signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import InputError
from .base import Mask, Rule
from .fields import look, on_meta
from .function_names import Nameless, function_of, name_for_graphs
from .user_function import (
    Absent,
    Function,
    as_picklable,
    call,
    check_function,
    check_result,
    from_picklable,
    name_of,
)
from .whole_numbers import as_int, is_count

PARAMETERS = ("b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True, repr=False, eq=False)
class MaskMod(Mask):
    """Query `q_idx` may attend key `kv_idx` where `function(b, h, q_idx, kv_idx)` says so.

    Args:
        function: takes integer tensors that broadcast to `[batch, num_heads, seqlen_q, seqlen_kv]`, returns a boolean
            one that does. It may capture tensors; what it captures is not moved by `.to`.
        tensors: what it reads beside; given to it behind the indices. They are a part of the value: moved, compared.
        batch: how many batch entries it was made for, where it varies by b; 1 is one for all. None: it ignores b.
        num_heads: the same of h.

        MaskMod(lambda b, h, q, k: (q - k).abs() % 2 == 0) on 4 x 5
        █·█·█
        ·█·█·
        █·█·█
        ·█·█·

    Two are equal where function and tensors are. The function is run anew at every call, as what it captures may have
    changed; `BlockMask.from_mask` looks once which blocks there is anything to see in.

    Raises InputTypeError for what is no such function or tensors, InputError for sizes below 1; where it is evaluated,
    InputTypeError for a result that is no boolean tensor, and InputError, naming the function, for one that does not
    broadcast, for a function that fails on such tensors, or that varies by batch entry or head and was said not to.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...] = ()
    batch: int | None = None
    num_heads: int | None = None
    lengths: tuple[int, int] | None = None
    #: Of its function, where a graph can have one.
    graph_name: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        tensors = check_function("MaskMod", self.function, PARAMETERS, self.tensors)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "graph_name", name_for_graphs(self.function))
        for name in ("batch", "num_heads"):
            size = as_int(getattr(self, name))
            object.__setattr__(self, name, size)
            if size is not None and not is_count(size, 1):
                raise InputError(f"MaskMod: {name} must be an int >= 1, or None where it is ignored, got {size!r}")

    def __repr__(self) -> str:
        text = f"MaskMod({name_of(self.function)}"
        for name in ("batch", "num_heads"):
            size = getattr(self, name)
            text += "" if size is None else f", {name}={size}"
        return f"{text})" if self.lengths is None else f"{text}).bind{self.lengths}"

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The function's own result: a decorated function may be called as before."""
        result: Tensor = self.function(b, h, q_idx, kv_idx, *self.tensors)
        return result

    def __eq__(self, other: object) -> bool:
        if type(other) is not MaskMod:
            return NotImplemented
        return bool(self.function == other.function) and super().__eq__(other)

    __hash__ = Mask.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        kept = as_picklable(self, self.function)
        return _restored, (kept, self.tensors, self.batch, self.num_heads, self.lengths)

    # A value that holds data: the function itself is no part of its key, so that it is not kept with a choice.

    @property
    def key(self) -> tuple[object, ...]:
        return MaskMod, *map(look, self.tensors), self.batch, self.num_heads, self.lengths

    @property
    def holds_data(self) -> bool:
        return True

    def held(self) -> dict[str, Tensor]:
        return {f"tensors.{n}": tensor for n, tensor in enumerate(self.tensors)}

    @property
    def requires_grad(self) -> bool:
        """False: whether a key may be attended has no gradient."""
        return False

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        return self.batch or 1, self.num_heads or 1

    def at(self, lengths: tuple[int, int]) -> MaskMod:
        return self._with(self.function, self.tensors, lengths)

    def with_held(self, tensors: dict[str, Tensor]) -> MaskMod:
        return self._with(self.function, tuple((self.held() | tensors).values()), self.lengths)

    def without_data(self) -> MaskMod:
        return self._with(Absent(name_of(self.function)), tuple(map(on_meta, self.tensors)), self.lengths)

    def _with(self, function: Function, tensors: tuple[Tensor, ...], lengths: tuple[int, int] | None) -> MaskMod:
        return _made(function, tensors, self.batch, self.num_heads, lengths, self.graph_name)

    def facts(self) -> tuple[Any, ...]:
        looks = tuple([(tensor.ndim, tensor.dtype) for tensor in self.tensors])
        return self.graph_name or Nameless, self.batch is not None, self.num_heads is not None, looks

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> MaskMod:
        name, of_batch, of_heads, looks = facts
        named = isinstance(name, str)
        function = function_of(name) if named else Absent("<function>")
        tensors = tuple(torch.empty((1,) * rank, dtype=dtype, device="meta") for rank, dtype in looks)
        sizes = (batch if of_batch else None), (num_heads if of_heads else None)
        return _made(function, tensors, *sizes, lengths, name if named else None)

    # The rule

    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # What is said to be ignored comes in a dimension of its own, which then must not be in the result.
        rank = max(b.ndim, h.ndim, q.ndim, k.ndim)
        given_b = b.new_zeros((2, *(1,) * rank)) if self.batch is None else b
        given_h = h.new_zeros((2, *(1,) * (rank + 1))) if self.num_heads is None else h
        kept = call("mask_mod", self.function, given_b, given_h, q, k, *self.tensors)
        if isinstance(kept, Tensor) and kept.ndim == rank + 2 and self.num_heads is None:
            self._refuse("head (h)", "num_heads")
        if isinstance(kept, Tensor) and kept.ndim == rank + 1 and self.batch is None and kept.shape[0] == 2:
            self._refuse("batch entry (b)", "batch")
        is_boolean = isinstance(kept, Tensor) and kept.dtype is torch.bool
        check_result("mask_mod", self.function, kept, "boolean", is_boolean, (b, h, q, k))
        return kept  # type: ignore[no-any-return]

    def rule(self, device: torch.device | str) -> Rule:
        some = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1,) * 4, (1,) * 3, (2, 1), (3,))]
        self.keep(*some)  # checked here, as nothing can be in a kernel's own code
        function, tensors = self.function, self.tensors
        return lambda b, h, q, k: function(b, h, q, k, *tensors)

    def _refuse(self, what: str, size: str) -> None:
        raise InputError(
            f"bias: mask_mod {name_of(self.function)} varies by {what}, or returns its shape: say {size}=, how many it"
            f" was made for (mask_mod(function, {size}=...))"
        )


def _made(
    function: Function,
    tensors: tuple[Tensor, ...],
    batch: int | None,
    num_heads: int | None,
    lengths: tuple[int, int] | None,
    name: str | None,
) -> MaskMod:
    """One of values that were checked before."""
    bias = object.__new__(MaskMod)
    object.__setattr__(bias, "function", function)
    object.__setattr__(bias, "tensors", tensors)
    object.__setattr__(bias, "batch", batch)
    object.__setattr__(bias, "num_heads", num_heads)
    object.__setattr__(bias, "lengths", lengths)
    object.__setattr__(bias, "graph_name", name)
    return bias


def _restored(
    kept: Any, tensors: tuple[Tensor, ...], batch: int | None, num_heads: int | None, lengths: tuple[int, int] | None
) -> MaskMod:
    function = from_picklable(kept)
    return _made(function, tensors, batch, num_heads, lengths, name_for_graphs(function))


@overload
def mask_mod(
    function: Function, *, tensors: tuple[Tensor, ...] = (), batch: int | None = None, num_heads: int | None = None
) -> MaskMod: ...


@overload
def mask_mod(
    function: None = None, *, tensors: tuple[Tensor, ...] = (), batch: int | None = None, num_heads: int | None = None
) -> Callable[[Function], MaskMod]: ...


def mask_mod(
    function: Callable[..., Any] | None = None,
    *,
    tensors: tuple[Tensor, ...] = (),
    batch: int | None = None,
    num_heads: int | None = None,
) -> MaskMod | Callable[[Callable[..., Any]], MaskMod]:
    """A mask of a function `(b, h, q_idx, kv_idx) -> boolean tensor`, as FlexAttention takes it; also a decorator, with
    or without options. Arguments and errors are those of `MaskMod`."""
    if function is None:
        return lambda given: MaskMod(given, tensors, batch, num_heads)
    return MaskMod(function, tensors, batch, num_heads)
