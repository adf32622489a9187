"""What a bias is, and the three questions that a mask answers.

A bias changes logits before the softmax. A mask is a bias of 0 and -inf. Each kind states its rule once, in `keep`;
the dense tensor, the drawn matrix, the pairs that a kernel visits and (for tiled kernels) what may be skipped are
derived from it, so no kernel has a second opinion of what a mask means.

Biases are values: frozen, comparable, picklable, and usable inside a compiled graph. They may be written without
lengths; `bind` gives the value that knows them. A kind is best a frozen dataclass, `lengths` the last of its fields;
what can be told from the fields (`key`, `at`, `facts`, which tensors are held) has a default here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError, UnboundBiasError
from .fields import Derived, as_fact, changed, from_fact, look, made, on_meta, parameters
from .whole_numbers import is_length

if TYPE_CHECKING:
    from .paged import Paged

Self = TypeVar("Self", bound="AttnBias")
TileKind = Literal["empty", "full", "mixed"]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_is_tracing = torch.compiler.is_dynamo_compiling  # looked up once: in a graph, each lookup is a guard

MASKED = float("-inf")


def known(condition: Any) -> bool:
    """Whether `condition` is certainly true.

    Lengths may be symbolic while a graph is traced. Rewriting a bias is only allowed where the rewrite holds for
    every length of that graph, so an undecided condition counts as false, and no guard is added.
    """
    if not _is_tracing() and isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # only reached while tracing

    return statically_known_true(condition)


def indices(
    batch: int, num_heads: int, seqlen_q: int, seqlen_kv: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(b, h, q, k) of every logit, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`."""
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(num_heads, device=device)[:, None, None]
    q = torch.arange(seqlen_q, device=device)[:, None]
    return b, h, q, torch.arange(seqlen_kv, device=device)


#: The axes of logits.
AXES = ("batch", "num_heads", "seqlen_q", "seqlen_kv")


def check_shape(bias: AttnBias, what: str, got: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises InputError, naming the axis, where a tensor does not broadcast to `wanted`, as it must by what `bias`
    says of itself."""
    shape = got.shape
    text = f"bias: the {what} of {type(bias).__name__} has shape {list(shape)}"
    if len(shape) > 4:
        raise InputError(f"{text}, which has {len(shape)} dimensions")
    for axis, has, says in zip(AXES[4 - len(shape) :], shape, wanted[4 - len(shape) :]):
        if has != 1 and has != says:
            told = f"; its `batch_and_heads` is {bias.batch_and_heads}" if axis in AXES[:2] else ""
            raise InputError(f"{text}: {axis}={has}, and by what it says of itself it is {axis}={says}{told}")


class AttnBias(ABC):
    """Anything that changes logits before the softmax.

    A subclass that states a rule derives from `Mask` or `Score`, and gives that rule. One that derives from this class
    gives three methods: `materialize`, `needs_materialization` and `dispatch`; a call uses these and nothing else of
    it, so it may be any class, with any other attributes. The rest has defaults, told from the fields; of a frozen
    dataclass the last is `lengths: tuple[int, int] | None = None`.
    """

    #: Whether calls go by the three methods alone. False where the core knows what the bias does.
    by_methods: ClassVar[bool] = True

    #: (seqlen_q, seqlen_kv) once bound, else None.
    lengths: tuple[int, int] | None = None

    @Derived
    def key(self) -> Hashable:
        """All that a kernel's choice or memory safety may depend on, without the data. Raises InputTypeError where
        calls go by the three methods: what these answer depends on anything."""
        raise InputTypeError(f"{type(self).__name__}: known by its methods alone")

    def _compared(self) -> Hashable:
        return (type(self), *[look(value) for _, value in parameters(self)], self.lengths)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, AttnBias)
        pairs = zip(self.held().values(), other.held().values())
        return self._compared() == other._compared() and all(a is b or a.is_meta or torch.equal(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(self._compared())

    def __add__(self, other: AttnBias | Tensor) -> AttnBias:
        """Both at once: what is added is summed, what is masked by either stays masked."""
        from .sum import added_up  # which knows this module

        return added_up(self, other)

    def __radd__(self, other: Tensor) -> AttnBias:
        return self + other

    def bind(self: Self, seqlen_q: int, seqlen_kv: int) -> Self:
        """The same bias, knowing its lengths. Raises InputError where it was made for others."""
        self._check_rebind(seqlen_q, seqlen_kv)
        return self.at((seqlen_q, seqlen_kv))

    @abstractmethod
    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """The dense form, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`.

        Boolean (True = may attend) for a mask, floating (added to the logits) otherwise.
        """

    @abstractmethod
    def needs_materialization(self) -> bool:
        """Whether a call takes the tensor that `materialize` gives; else it calls `dispatch`."""

    @staticmethod
    @abstractmethod
    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any,
        causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Attention with this bias. Operands and result are `[..., num_heads, seqlen, head_dim]`, as torch has them.

        Called by position, in this order. `causal` is `is_causal` of scaled_dot_product_attention, False from
        `attention`; `scale` is None for the default.
        """

    def dense(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        """`materialize`, with a floating result computed in `dtype` where the rule can be."""
        return self.materialize(device)

    def checked_dense(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        """`dense`, checked. Raises InputError where it has another shape than `batch_and_heads` and the lengths say."""
        dense = self.dense(device, dtype)
        check_shape(self, "dense form", dense, (*self.batch_and_heads, *self.bound_lengths()))
        return dense

    def check_rule(self) -> None:
        """Raises InputError where a bound bias does not say `batch_and_heads`, and has a rule that tells some apart."""
        return

    def is_for_any_batch_and_head(self) -> bool:
        """Whether its class says nothing of `batch_and_heads`, or that it is as here."""
        return type(self).batch_and_heads is AttnBias.batch_and_heads

    @Derived
    def has_dense_form(self) -> bool:
        """Whether a tensor can say what it does; a function of the logit itself cannot be written out."""
        return True

    def score(self, logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The logit of query `q` and key `k`, batch entry `b` and head `h`, as this bias changes it.

        Index tensors broadcast against each other and the logits.
        """
        dense = self.materialize(logit.device)
        dense = dense.reshape((1,) * (4 - dense.ndim) + tuple(dense.shape))
        batch, heads, rows, columns = (int(size != 1) for size in dense.shape)  # a size of 1 is read at index 0
        value = dense[b * batch, h * heads, q * rows, k * columns]
        return torch.where(value, logit, MASKED) if value.dtype is torch.bool else logit + value

    def apply(self, logits: Tensor) -> Tensor:
        """Logits `[batch, num_heads, seqlen_q, seqlen_kv]`, as this bias changes them."""
        dense = self.checked_dense(logits.device, logits.dtype)
        return logits.masked_fill(~dense, MASKED) if dense.dtype is torch.bool else logits + dense.to(logits.dtype)

    @Derived
    def mask(self) -> Mask | None:
        """The part of it that is a mask; None where nothing of it is."""
        return None

    @Derived
    def scores(self) -> tuple[AttnBias, ...]:
        """The parts of it that are not masks, in the order in which they are applied."""
        return (self,)

    @Derived
    def paged(self) -> Paged | None:
        """The part of it that says in which pages the keys lie; None where they lie in a row."""
        return None

    def gathered(self) -> AttnBias:
        """The same for keys that were taken from their pages and lie in a row."""
        return self

    @Derived
    def batch_and_heads(self) -> tuple[int, int]:
        """`(batch, num_heads)` that the bias was made for; 1 fits any."""
        return 1, 1

    def held(self) -> dict[str, Tensor]:
        """The tensors that the value holds, by name."""
        return {name: value for name, value in parameters(self) if isinstance(value, Tensor)}

    @Derived
    def holds_data(self) -> bool:
        """Whether the value holds tensors: then a call's own bias is handed to the kernel, not the first one's."""
        return bool(self.held())

    @Derived
    def requires_grad(self) -> bool:
        """Whether a gradient flows to a tensor of this bias."""
        return any(tensor.requires_grad for tensor in self.held().values())

    @Derived
    def device(self) -> torch.device | None:
        """Where the tensors of this bias lie; None where it holds none."""
        return next((tensor.device for tensor in self.held().values()), None)

    def to(self: Self, *args: torch.device | str | torch.dtype) -> Self:
        """The same bias with its tensors on another device, and its floating ones of another dtype, as `Module.to`."""
        places = tuple([arg for arg in args if not isinstance(arg, torch.dtype)])
        moved = {
            name: tensor.to(*(args if tensor.is_floating_point() else places))  # type: ignore[call-overload]
            for name, tensor in self.held().items()
        }
        return self.with_held(moved)

    def without_data(self: Self) -> Self:
        """The same bias with its tensors on the meta device: what `Problem` keeps."""
        return self.with_held({name: on_meta(tensor) for name, tensor in self.held().items()})

    def with_held(self: Self, tensors: dict[str, Tensor]) -> Self:
        """The same bias with other tensors in place of those of these names."""
        return changed(self, tensors) if tensors else self

    def at(self: Self, lengths: tuple[int, int]) -> Self:
        """The same bias with these lengths, unchecked; `bind` is the checked form."""
        return changed(self, {"lengths": lengths})

    def facts(self) -> tuple[Any, ...]:
        """What of it is constant where a graph is traced: plain values, no lengths, no tensors."""
        return tuple([(name, as_fact(value)) for name, value in parameters(self)])

    @classmethod
    def from_facts(
        cls: type[Self], facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]
    ) -> Self:
        """A stand-in of these facts and sizes, without data, to weigh kernels by."""
        return made(cls, {name: from_fact(fact) for name, fact in facts} | {"lengths": lengths})

    def normalize(self) -> AttnBias | None:
        """The simplest bias equal to this one at its lengths; None where it changes nothing."""
        return self

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor | None:
        """`[batch, seqlen_kv]`, True where a key exists at all; None where all do.

        What lies behind the lengths is padding: it may be anything, NaN too, and must not leak.
        """
        return None

    @Derived
    def has_padding(self) -> bool:
        """Whether keys behind its lengths do not exist, and may be anything; then `valid_keys` says which do."""
        return type(self).valid_keys is not AttnBias.valid_keys

    def without_padding(self) -> AttnBias:
        """The same for keys and values that hold zeros where none exist: a mask that has no padding. Other biases stay
        as they are."""
        return self

    def pairs(self) -> float:
        """How many (query, key) pairs remain, per batch entry and head; an estimate suffices."""
        seqlen_q, seqlen_kv = self.bound_lengths()
        return float(seqlen_q) * float(seqlen_kv)

    def draw(self, batch_entry: int = 0, head: int = 0) -> str:
        """The matrix of one batch entry and head, once bound; cut to 16 rows of 64.

        Of a mask, `█` may attend and `·` is masked; where something is added, shades of it and what they stand for.
        Raises UnboundBiasError before `bind`, InputError for a batch entry or head that it was not made for.
        """
        from .drawing import draw  # only for people

        return draw(self, batch_entry, head)

    def _repr_html_(self) -> str:
        from .drawing import as_html

        return as_html(self)

    def bound_lengths(self) -> tuple[int, int]:
        """`(seqlen_q, seqlen_kv)`; raises UnboundBiasError before `bind`."""
        if self.lengths is None:
            raise UnboundBiasError(
                f"{self!r} does not know its lengths yet; call .bind(seqlen_q, seqlen_kv) first"
                " (attention binds a bias by itself)"
            )
        return self.lengths

    def _check_rebind(self, seqlen_q: int, seqlen_kv: int) -> None:
        if not _is_tracing():
            for name, seqlen in (("seqlen_q", seqlen_q), ("seqlen_kv", seqlen_kv)):
                if not is_length(seqlen):
                    raise InputError(f"bind: {name} must be an int >= 0, got {seqlen!r}")
        if self.lengths is not None and self.lengths != (seqlen_q, seqlen_kv):
            raise InputError(
                f"bias: {self!r} was made for seqlen_q={self.lengths[0]}, seqlen_kv={self.lengths[1]},"
                f" got seqlen_q={seqlen_q}, seqlen_kv={seqlen_kv}"
            )


class Kind(AttnBias):
    """A bias of which the core knows what it does: kernels are chosen for it.

    A subclass that gives `needs_materialization` or `dispatch` of its own is taken by its three methods all the same.
    """

    by_methods = False

    @Derived
    def key(self) -> Hashable:
        """All that a kernel's choice or memory safety may depend on, without the data."""
        return super()._compared()

    def _compared(self) -> Hashable:
        return self.key

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "by_methods" not in own and ("needs_materialization" in own or "dispatch" in own):
            cls.by_methods = True

    def needs_materialization(self) -> bool:
        return False

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
        """`attn_core.scaled_dot_product_attention` with this bias."""
        from ..functional import scaled_dot_product_attention  # which is made of biases

        return scaled_dot_product_attention(query, key, value, attn_bias, dropout_p, causal, scale=scale)


class Mask(Kind):
    """A bias of 0 and -inf, defined by `keep`; `span` and `tile` say what a kernel may skip.

    `a & b` lets a query attend what both let it.
    """

    def __and__(self, other: AttnBias | Tensor) -> Mask:
        from .intersection import Intersection  # which is a mask itself

        if not isinstance(other, Mask):
            if isinstance(other, (AttnBias, Tensor)):
                what = f"a tensor of shape {list(other.shape)}" if isinstance(other, Tensor) else repr(other)
                raise InputTypeError(f"{self!r} & {what}: only masks intersect; `+` joins a mask and what is none")
            return NotImplemented
        parts: list[Mask] = []
        for mask in (self, other):
            parts += mask.parts if isinstance(mask, Intersection) else [mask]
        return Intersection(tuple(parts)).bound_by_parts()

    __rand__ = __and__  # a bias on the left has an `&` of its own, or none

    @property
    def mask(self) -> Mask:
        return self

    @property
    def scores(self) -> tuple[AttnBias, ...]:
        return ()

    def score(self, logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(self.keep(b, h, q, k), logit, MASKED)

    def check_rule(self) -> None:
        if self.is_for_any_batch_and_head() and 0 not in self.bound_lengths():
            check_shape(self, "rule", self.keep(*indices(1, 1, 1, 1, self.device or "cpu")), (1, 1, 1, 1))

    def without_padding(self) -> Mask:
        from .zero_padded import ZeroPadded  # which is a mask itself

        return ZeroPadded(self, self.lengths) if self.has_padding else self

    @abstractmethod
    def keep(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The exact rule: True where query `q` of batch entry `b` and head `h` may attend key `k`.

        Index tensors broadcast against each other; a rule that ignores one leaves that dimension out.
        """

    def rule(self, device: torch.device | str) -> Rule:
        """`keep` as a plain function, for indices on `device`. What it looks up is made and moved there beforehand: a
        kernel that has the rule in its own code can make nothing there."""
        return lambda b, h, q, k: self.keep(b, h, q, k)  # tracing refuses a bound method

    def span(self, q0: int, q1: int) -> tuple[int, int]:
        """Keys `[k0, k1)` outside which no query of `[q0, q1)` attends anything; may be too wide, never too narrow."""
        return 0, self.bound_lengths()[1]

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> TileKind:
        """Whether the block `[q0, q1) x [k0, k1)` is empty, full or mixed; "mixed" is always a legal answer."""
        low, high = self.span(q0, q1)
        return "empty" if k1 <= low or k0 >= high else "mixed"

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """Boolean tensor, True = may attend, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`."""
        seqlen_q, seqlen_kv = self.bound_lengths()
        batch, num_heads = self.batch_and_heads
        return self.keep(*indices(batch, num_heads, seqlen_q, seqlen_kv, device or self.device or "cpu"))
