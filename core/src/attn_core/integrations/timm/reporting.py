"""report(model): which modules of a model compute attention by attn, which do not, and why.

Nothing runs: what a module calls is read off its methods. So every module that mentions a softmax or
scaled_dot_product_attention is in the report, with its reason where it is left alone; what ran is for `record` to say.
"""

from __future__ import annotations

from types import CodeType

import torch
from torch import nn

from ..reported import Report, ReportRow, by_torch
from ..torch import is_swapped
from . import fused
from .layers import OWN, is_attn_layer
from .reasons import NEVER, why_never
from .sites import RENAMED, SDPA, bare, mentions
from .switch import is_enabled

SOFTMAX = ("softmax", "Softmax")
CALLS = (SDPA, RENAMED[SDPA], OWN[SDPA])


def report(model: nn.Module) -> Report:
    """Which modules of the model compute attention by attn as things stand, and why the others do not."""
    rows = []
    for name, module in model.named_modules():
        answer = _answer(module)
        if answer is not None:
            redirected, reason = answer
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            rows.append(ReportRow(module=name, kind=kind, redirected=redirected, reason=reason))
    return Report(rows=tuple(rows))


def _answer(module: nn.Module) -> tuple[bool, str] | None:
    """(whether it is redirected, why or why not); None for a module without attention."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return _of_script(module)
    if isinstance(module, torch.fx.GraphModule):
        return _of_graph(module)
    if isinstance(module, nn.MultiheadAttention):
        return by_torch(module, "torch's own module, not timm's")
    if cls.__module__.startswith("torch.nn."):  # nn.Softmax belongs to whoever uses it
        return None
    calls = _codes(cls, *CALLS)
    if not calls:
        return (False, why_never(cls)) if _codes(cls, *SOFTMAX) else None
    if is_attn_layer(module):
        return _unless_off(module, "by its class")
    changed = any(mentions(code, RENAMED[SDPA]) for _, code in calls)
    if is_swapped(module):
        if not changed and not getattr(module, "fused_attn", True):
            return False, "fused_attn is off, which a class that was swapped heeds"
        return _unless_off(module, by_torch(module)[1])
    if not any(owner.__module__.partition(".")[0] == "timm" for owner, _ in calls):
        return by_torch(module, "calls torch's attention in code that is not timm's")
    if not is_enabled():
        return False, "attn is not enabled for timm; attn_core.integrations.timm.enable() does that"
    if not changed:
        return False, "its code is not the one that enable() found"
    return _unless_off(module, "")


def _unless_off(module: nn.Module, word: str) -> tuple[bool, str]:
    """Redirected, unless something about this very module is in the way."""
    if getattr(module, "einsum", False):
        return False, f"{NEVER} with einsum=True"
    if getattr(module, "fused_attn", True):
        return True, word
    against = fused.reason_against(module)
    return (True, "with fused_attn off, which counts no more") if against is None else (False, against)


def _of_script(module: torch.jit.ScriptModule) -> tuple[bool, str] | None:
    try:
        graph = str(module.inlined_graph) if not list(module.children()) else str(module.graph)
    except (AttributeError, RuntimeError):  # no forward
        return None
    if SDPA not in graph and "softmax" not in graph:
        return None
    return False, "TorchScript, which runs without Python"


def _of_graph(module: torch.fx.GraphModule) -> tuple[bool, str] | None:
    names = {getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes}
    if not any(SDPA in name or "softmax" in name for name in names):
        return None
    return False, "a graph of torch.fx, in which torch's own attention stands"


def _codes(cls: type, *names: str) -> list[tuple[type, CodeType]]:
    """Methods that an instance can run and that look one of these names up, each with the class it is of."""
    found, hidden = [], set()
    for owner in cls.__mro__:
        if owner is nn.Module:
            break
        mine = set()
        for attribute, member in vars(owner).items():
            function = bare(member)
            if function is None or attribute == "__init__":
                continue
            if attribute not in hidden and mentions(function.__code__, *names):
                found.append((owner, function.__code__))
            if not mentions(function.__code__, "super"):  # else what it overrides may run, too
                mine.add(attribute)
        hidden |= mine
    return found
