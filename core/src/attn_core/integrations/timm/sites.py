"""Where timm calls torch's attention, and how these places come to call attn.

Forced by the host:
- It reaches scaled_dot_product_attention as an attribute of torch.nn.functional, by several names of that module (`F`,
  `nn.functional`, the full path), in some forty functions. Replacing the attribute would redirect everybody's calls.
- Some modules read the flag `fused_attn` when they are made, and keep it: with it off they never call
  scaled_dot_product_attention. Writing it would reach only the modules that somebody shows us, and leave those that
  are made meanwhile changed for good.

So the functions themselves are changed, and nothing else: each gets a copy of its code in which these two names are
others. The first is then a function of ours beside torch's, the second a property of the class. All models of the
process follow at once, whenever they were made; giving each function its own code object back is the way back. What
reads the source (torch.jit.script) sees timm's, and torch.compile finds plain functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from ..torch import reach

SDPA = "scaled_dot_product_attention"
FUSED = "fused_attn"
#: Names in the changed code: looked up in torch.nn.functional, and on the module that computes attention. Nothing is
#: put in the place of another, and both stay when all is changed back: a thread may be in the middle of such a call.
RENAMED = {SDPA: "_attn_timm_sdpa", FUSED: "_attn_timm_fused"}
reach.NAMES.add(RENAMED[SDPA])  # a module of timm can be swapped then, too


@dataclass(frozen=True, kw_only=True)
class Site:
    """A function of timm that calls scaled_dot_product_attention."""

    function: FunctionType
    owner: type | None  #: the class whose method it is
    stock: CodeType
    redirected: CodeType

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def sites(package: str = "timm") -> list[Site]:
    """Every function of the package that calls scaled_dot_product_attention, in the modules that are imported."""
    found: dict[int, Site] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name != package and not module_name.startswith(f"{package}."):
            continue
        for owner, function in functions_of(vars(module).copy(), module_name):
            if id(function) not in found and mentions(function.__code__, SDPA):
                code = function.__code__
                found[id(function)] = Site(
                    function=function, owner=owner, stock=code, redirected=renamed(code, RENAMED)
                )
    return list(found.values())


def functions_of(names: Mapping[str, Any], module_name: str) -> Iterator[tuple[type | None, FunctionType]]:
    """Functions that the module itself defines, and methods of its classes, each with its class."""
    for value in names.values():
        if getattr(value, "__module__", None) != module_name:
            continue
        if isinstance(value, FunctionType):
            yield None, value
        elif isinstance(value, type):
            for member in vars(value).values():
                function = bare(member)
                if function is not None:
                    yield value, function


def bare(member: object) -> FunctionType | None:
    """The function behind a member of a class; None where it is something else."""
    member = getattr(member, "__func__", member)
    return member if isinstance(member, FunctionType) else None


def mentions(code: CodeType, *names: str) -> bool:
    """Whether code, or code within it, looks one of these names up."""
    return any(name in code.co_names for name in names) or any(
        mentions(inner, *names) for inner in code.co_consts if isinstance(inner, CodeType)
    )


def renamed(code: CodeType, names: Mapping[str, str]) -> CodeType:
    """The same code, but for names that it looks up."""
    return code.replace(
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_consts=tuple(renamed(c, names) if isinstance(c, CodeType) else c for c in code.co_consts),
    )


def passes_dropout(code: CodeType) -> bool:
    """Whether its call of scaled_dot_product_attention has a dropout_p."""
    return any(isinstance(constant, tuple) and "dropout_p" in constant for constant in code.co_consts)
