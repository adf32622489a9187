"""Joint: a bias made of several, which are asked one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .base import Kind

if TYPE_CHECKING:
    from .paged import Paged

Self = TypeVar("Self", bound="Joint")


class Joint(Kind):
    """What intersections and sums have in common. A subclass is a dataclass of `parts` and `lengths`."""

    parts: tuple[Any, ...]

    def check_parts(self) -> None:
        """Raises InputError for fewer than two, or parts that were made for other lengths, batches, heads, devices;
        InputTypeError for a bias that is known by its methods alone."""
        name = type(self).__name__
        if len(self.parts) < 2:
            raise InputError(f"{name}: takes two or more, got {len(self.parts)}")
        for part in self.parts:
            if not isinstance(part, Kind):
                part_of = type(part).__name__
                raise InputTypeError(
                    f"{name}: {part_of} is known by its three methods alone, so it joins nothing; where it can"
                    f" materialize, write TensorBias(bias.materialize(device)) in its place"
                )
        first = next((part for part in self.parts if part.lengths is not None), None)
        for part in self.parts:
            if first is not None and part.lengths is not None and part.lengths != first.lengths:
                raise InputError(f"{name}: {part!r} was made for other lengths than {first!r}")
        for place, what in enumerate(("batch", "num_heads")):
            sizes = {part.batch_and_heads[place] for part in self.parts} - {1}
            if len(sizes) > 1:
                made_for = " and ".join(map(str, sorted(sizes)))
                raise InputError(f"{name}: its parts were made for {what}={made_for}")
        if len([part for part in self.parts if part.paged is not None]) > 1:
            raise InputError(f"{name}: keys lie in the pages of one Paged, got {' and '.join(map(repr, self.parts))}")
        devices = {part.device for part in self.parts} - {None}
        if len(devices) > 1:
            raise InputError(f"{name}: its parts lie on {' and '.join(sorted(map(str, devices)))}; move them to one")

    def bound_by_parts(self: Self) -> Self:
        """Bound, where a part is: to its lengths."""
        lengths = next((part.lengths for part in self.parts if part.lengths is not None), None)
        return self if lengths is None else self.bind(*lengths)

    def _of(self: Self, parts: list[Any], lengths: tuple[int, int] | None) -> Self:
        return type(self)(tuple(parts), lengths)  # type: ignore[call-arg]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.parts == other.parts and self.lengths == other.lengths

    __hash__ = Kind.__hash__

    @property
    def key(self) -> tuple[object, ...]:
        return (type(self), *[part.key for part in self.parts], self.lengths)

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        batches, heads = zip(*[part.batch_and_heads for part in self.parts])
        return next((n for n in batches if n != 1), 1), next((n for n in heads if n != 1), 1)  # an empty batch counts

    def held(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.held().items()}

    @property
    def holds_data(self) -> bool:
        return any(part.holds_data for part in self.parts)

    @property
    def requires_grad(self) -> bool:
        return any(part.requires_grad for part in self.parts)

    @property
    def paged(self) -> Paged | None:
        return next((part.paged for part in self.parts if part.paged is not None), None)

    def gathered(self: Self) -> Self:
        return self if self.paged is None else self._of([part.gathered() for part in self.parts], self.lengths)

    @property
    def has_padding(self) -> bool:
        return any(part.has_padding for part in self.parts)

    def check_rule(self) -> None:
        for part in self.parts:
            part.check_rule()

    def without_padding(self: Self) -> Self:
        return self._of([part.without_padding() for part in self.parts], self.lengths) if self.has_padding else self

    @property
    def device(self) -> torch.device | None:
        return next((part.device for part in self.parts if part.device is not None), None)

    def with_held(self: Self, tensors: dict[str, Tensor]) -> Self:
        of_part: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for path, tensor in tensors.items():
            place, _, name = path.partition(".")
            of_part[int(place)][name] = tensor
        return self._of([part.with_held(own) for part, own in zip(self.parts, of_part)], self.lengths)

    def bind(self: Self, seqlen_q: int, seqlen_kv: int) -> Self:
        return self._of([part.bind(seqlen_q, seqlen_kv) for part in self.parts], (seqlen_q, seqlen_kv))

    def at(self: Self, lengths: tuple[int, int]) -> Self:
        return self._of([part.at(lengths) for part in self.parts], lengths)

    def facts(self) -> tuple[Any, ...]:
        facts = []
        for part in self.parts:
            batch, num_heads = part.batch_and_heads
            # Branching on a symbolic size, not bool(), makes the answer a constant of the graph.
            many_batches, many_heads = (True if size != 1 else False for size in (batch, num_heads))  # noqa: SIM210
            facts.append((type(part), part.facts(), many_batches, many_heads))
        return tuple(facts)

    @classmethod
    def from_facts(
        cls: type[Self], facts: tuple[Any, ...], batch: int, num_heads: int, lengths: tuple[int, int]
    ) -> Self:
        parts = [
            kind.from_facts(own, batch if batches else 1, num_heads if heads else 1, lengths)
            for kind, own, batches, heads in facts
        ]
        return cls(tuple(parts), lengths)  # type: ignore[call-arg]

    def valid_keys(self, device: torch.device | str | None = None) -> Tensor | None:
        valid = None
        for part in self.parts:
            own = part.valid_keys(device)
            if own is not None:
                valid = own if valid is None else valid & own
        return valid
