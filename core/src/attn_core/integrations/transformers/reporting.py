"""report(model): which modules of a model run their attention by attn, which do not, and why.

Nothing runs: what a module calls is read off the code of its methods. What ran is for `record` to say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..reported import Report, ReportRow, by_torch

#: What a method that asks the host's registry for its attention function mentions.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
SDPA = "scaled_dot_product_attention"
SOFTMAX = ("softmax", "Softmax")
#: Modules whose classes are no part of any model.
_NOT_OF_A_MODEL = ("torch.nn.modules.module", "transformers.modeling_utils")


def report_on(model: nn.Module, names: Collection[str]) -> Report:
    """The report, where models that are set to one of `names` run by attn."""
    rows: list[ReportRow] = []
    inner: set[str] = set()  # modules that hold one that is reported
    found = []
    for name, module in model.named_modules():
        answer = _answer(module, names)
        if answer is not None:
            found.append((name, module, answer))
    for name, _, (_, reason) in found:
        if reason != _UNKNOWN:
            parts = name.split(".")
            inner.update(".".join(parts[:n]) for n in range(len(parts)))
    for name, module, (redirected, reason) in found:
        if reason == _UNKNOWN and name in inner:  # a wrapper: what it holds computes
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        rows.append(ReportRow(module=name, kind=kind, redirected=redirected, reason=reason))
    return Report(rows=tuple(rows))


_UNKNOWN = "neither asks transformers' registry nor calls torch's attention: it computes by itself"


def _answer(module: nn.Module, names: Collection[str]) -> tuple[bool, str] | None:
    """(whether it is redirected, why or why not); None for a module without attention."""
    cls = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return by_torch(module, "torch's own module")
    if cls.__module__.startswith("torch."):
        return None
    mentioned = _mentioned(cls)
    if REGISTRY in mentioned:
        return _of_registry(module, names)
    if SDPA in mentioned:
        return by_torch(module, "calls torch's attention itself, past transformers' registry")
    if "attention" not in cls.__name__.lower():
        return None
    if mentioned.intersection(SOFTMAX):
        return False, "multiplies and takes the softmax itself"
    return False, _UNKNOWN


def _of_registry(module: nn.Module, names: Collection[str]) -> tuple[bool, str]:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if getattr(module, "sinks", None) is not None:
        return False, "has attention sinks, which attn has not"
    if chosen not in names:
        fix = 'set_attn_implementation("attn") changes that' if "attn" in names else "attn is not enabled"
        return False, f"set to {chosen!r}; {fix}"
    return True, f"set to {chosen!r}"


def _mentioned(cls: type) -> set[str]:
    """Names that the methods of a class mention, without its constructor, and without what all models have."""
    mentioned: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__ in _NOT_OF_A_MODEL:
            continue
        for attribute, member in vars(owner).items():
            code = getattr(_unwrapped(member), "__code__", None)
            if attribute != "__init__" and isinstance(code, CodeType):
                mentioned.update(_names(code))
    return mentioned


def _unwrapped(member: Any) -> Any:
    """The function behind a method, without the decorators that say what they wrap."""
    member = getattr(member, "__func__", member)
    seen = 0
    while hasattr(member, "__wrapped__") and seen < 16:
        member, seen = member.__wrapped__, seen + 1
    return member


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
