"""ScoreMod: a change of the logits by a function of the user's, with FlexAttention's signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import InputError
from .base import AttnBias, Kind, _is_tracing, indices
from .fields import look, on_meta
from .user_function import (
    Absent,
    Function,
    as_picklable,
    call,
    captured_tensors,
    check_function,
    check_result,
    from_picklable,
    name_of,
)

PARAMETERS = ("score", "b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True, repr=False, eq=False)
class ScoreMod(Kind):
    """Replaces the logit of query `q_idx` and key `kv_idx` by `function(score, b, h, q_idx, kv_idx)`.

    Args:
        function: takes the logits, and integer tensors that broadcast to their shape `[batch, num_heads, seqlen_q,
            seqlen_kv]`; returns a floating tensor that does. What it makes -inf is masked. It comes after scale and
            softcap.
        tensors: what it reads beside; given to it behind the indices. They are a part of the value: moved, compared,
            and a gradient flows to those that require one.

    It may be any function of the logit, so it has no dense form: only kernels that take functions run it. Captured
    tensors get gradients too, where they are seen: in the closure, defaults and globals of the function and of those
    that it calls, in containers, objects and nn.Modules among these. What it looks up in other modules is not seen, and
    a kernel without gradients to a bias may then be chosen; name it in `tensors`.

    Two are equal where function and tensors are. Raises InputTypeError for what is no such function or tensors; where
    it is evaluated, InputTypeError for a result that is no floating tensor, and InputError, naming the function, for
    one that does not broadcast, or for a function that fails on such tensors.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...] = ()
    lengths: tuple[int, int] | None = None
    captured: tuple[Tensor, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        tensors = check_function("ScoreMod", self.function, PARAMETERS, self.tensors)
        captured = () if _is_tracing() else captured_tensors(self.function)
        self._set(self.function, tensors, captured, self.lengths)

    def _set(self, function: Function, tensors: tuple[Tensor, ...], captured: tuple[Tensor, ...], lengths: Any) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "captured", captured)
        object.__setattr__(self, "lengths", lengths)

    def __repr__(self) -> str:
        text = f"ScoreMod({name_of(self.function)}{', requires_grad' if self.requires_grad else ''})"
        return text if self.lengths is None else f"{text}.bind{self.lengths}"

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The function's own result: a decorated function may be called as before."""
        result: Tensor = self.function(score, b, h, q_idx, kv_idx, *self.tensors)
        return result

    def __eq__(self, other: object) -> bool:
        if type(other) is not ScoreMod:
            return NotImplemented
        return bool(self.function == other.function) and super().__eq__(other)

    __hash__ = AttnBias.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (as_picklable(self, self.function), self.tensors, self.lengths)

    # A value that holds data: the function itself is no part of its key, so that it is not kept with a choice.

    @property
    def key(self) -> tuple[object, ...]:
        return ScoreMod, *map(look, self.tensors), self.requires_grad, self.lengths

    @property
    def holds_data(self) -> bool:
        return True

    def held(self) -> dict[str, Tensor]:
        return {f"tensors.{n}": tensor for n, tensor in enumerate(self.tensors)}

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in (*self.tensors, *self.captured))

    @property
    def has_dense_form(self) -> bool:
        return False

    def at(self, lengths: tuple[int, int]) -> ScoreMod:
        return _made(self.function, self.tensors, self.captured, lengths)

    def with_held(self, tensors: dict[str, Tensor]) -> ScoreMod:
        held = tuple((self.held() | tensors).values())
        return _made(self.function, held, self.captured, self.lengths)

    def without_data(self) -> ScoreMod:
        held = tuple(map(on_meta, self.tensors))
        captured = () if not any(tensor.requires_grad for tensor in self.captured) else (_GRADIENT,)
        return _made(Absent(name_of(self.function)), held, captured, self.lengths)

    def facts(self) -> tuple[Any, ...]:
        return tuple([(tensor.ndim, tensor.dtype, tensor.requires_grad) for tensor in self.tensors])

    @classmethod
    def from_facts(cls, facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]) -> ScoreMod:
        tensors = tuple(
            torch.empty((1,) * rank, dtype=dtype, device="meta", requires_grad=grad) for rank, dtype, grad in facts
        )
        return _made(Absent("<function>"), tensors, (), lengths)

    # What it does

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """Raises InputError: a function of the logit cannot be written out."""
        raise InputError(f"bias: {self!r} has no dense form, as it may be any function of the logit")

    def score(self, logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        changed = call("score_mod", self.function, logit, b, h, q, k, *self.tensors)
        is_floating = isinstance(changed, Tensor) and changed.is_floating_point()
        check_result("score_mod", self.function, changed, "floating", is_floating, (logit, b, h, q, k))
        return changed.to(logit.dtype)  # type: ignore[no-any-return]

    def apply(self, logits: Tensor) -> Tensor:
        batch, num_heads, seqlen_q, seqlen_kv = logits.shape
        changed = self.score(logits, *indices(batch, num_heads, seqlen_q, seqlen_kv, logits.device))
        return changed.expand(logits.shape)


#: Says of a bias without data that what its function captured requires a gradient.
_GRADIENT = torch.empty(0, device="meta", requires_grad=True)


def _made(
    function: Function, tensors: tuple[Tensor, ...], captured: tuple[Tensor, ...], lengths: tuple[int, int] | None
) -> ScoreMod:
    """One of values that were checked before."""
    bias = object.__new__(ScoreMod)
    bias._set(function, tensors, captured, lengths)
    return bias


def _restored(function: Any, tensors: tuple[Tensor, ...], lengths: tuple[int, int] | None) -> ScoreMod:
    return ScoreMod(from_picklable(function), tensors, lengths)


@overload
def score_mod(function: Function, *, tensors: tuple[Tensor, ...] = ()) -> ScoreMod: ...


@overload
def score_mod(function: None = None, *, tensors: tuple[Tensor, ...] = ()) -> Callable[[Function], ScoreMod]: ...


def score_mod(
    function: Callable[..., Any] | None = None, *, tensors: tuple[Tensor, ...] = ()
) -> ScoreMod | Callable[[Callable[..., Any]], ScoreMod]:
    """A change of the logits by a function `(score, b, h, q_idx, kv_idx) -> score`, as FlexAttention takes it; also a
    decorator, with or without options. Arguments and errors are those of `ScoreMod`."""
    if function is None:
        return lambda given: ScoreMod(given, tensors)
    return ScoreMod(function, tensors)
