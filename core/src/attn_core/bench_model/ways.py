"""The ways to run one model: as its library does, fused or not, and by attn with a choice of kernels.

Each way is a scope that leaves the library and the model as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import KernelRefusedError
from ..integrations.hosts import HOSTS, disable, enable
from ..scope import prefer
from .built import BuiltModel
from .results import AGAIN, ATTN, EAGER, STOCK

#: timm's modules have it where they can do without torch's attention.
FUSED = "fused_attn"


def way(by: str, built: BuiltModel) -> AbstractContextManager[None]:
    """A scope in which the model runs in this way; `by` as in Row."""
    if by == EAGER:
        return _eager(built)
    if by in (STOCK, AGAIN):
        return _stock()
    return _by_attn(built, None if by == ATTN else by)


@contextmanager
def _stock() -> Iterator[None]:
    disable()
    yield


@contextmanager
def _eager(built: BuiltModel) -> Iterator[None]:
    """Unfused as far as the library can; what calls torch's attention all the same runs torch's unfused one."""
    disable()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_UNFUSED[built.host](built.model))
        yield


@contextmanager
def _timm_unfused(model: nn.Module) -> Iterator[None]:
    fused = [module for module in model.modules() if getattr(module, FUSED, False) is True]
    for module in fused:
        setattr(module, FUSED, False)
    try:
        yield
    finally:
        for module in fused:
            setattr(module, FUSED, True)


@contextmanager
def _transformers_set(model: nn.Module, name: str) -> Iterator[None]:
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(name)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


@contextmanager
def _set_to_attn(built: BuiltModel) -> Iterator[None]:
    """For a model that does not use torch's attention by default, which attn stands in for."""
    scope = _transformers_set(built.model, "attn")
    try:
        scope.__enter__()
    except ValueError as error:
        raise KernelRefusedError(f"{built.name} lets no one choose its attention: {error}") from error
    with ExitStack() as stack:
        stack.push(scope)
        yield


#: Library -> the scope in which a model of it multiplies out its attention itself.
_UNFUSED: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "timm": _timm_unfused,
    "transformers": lambda model: _transformers_set(model, "eager"),
}


@contextmanager
def _by_attn(built: BuiltModel, kernel: str | None) -> Iterator[None]:
    enable(built.host)
    try:
        with ExitStack() as stack:
            if built.host == "transformers" and built.model.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
                stack.enter_context(_set_to_attn(built))
            if kernel is not None:
                stack.enter_context(prefer(kernel, strict=True))
            yield
    finally:
        disable(built.host)


def left_alone(built: BuiltModel) -> list[str]:
    """The modules whose attention stays the library's, each with the reason."""
    try:
        with way(ATTN, built):
            report = HOSTS[built.host].integration.report(built.model)
    except KernelRefusedError as error:
        return [str(error)]
    joined: dict[str, list[str]] = {}
    for row in report.left_alone:
        joined.setdefault(f"{row.kind.rpartition('.')[2]}: {row.reason}", []).append(row.module)
    return [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})" for why, names in joined.items()]
